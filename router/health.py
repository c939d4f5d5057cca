"""Health as grpc.health.v1 tells it: whether a request would be answered, for each service."""

import asyncio
from collections.abc import Callable

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]

from protos import inference_pb2

SERVICES = ("", *(service.full_name for service in inference_pb2.DESCRIPTOR.services_by_name.values()))
CHECK_EVERY_S = 0.1

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Follows the router: SERVING while a gang is ready and one of its ranks can be reached.

    Args:
        is_ready: whether a request would be answered now; cheap.

    Attributes:
        servicer: to add to a grpc.aio server.
    """

    def __init__(self, is_ready: Callable[[], bool]) -> None:
        self.servicer = health_aio.HealthServicer()
        self._is_ready = is_ready
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Follows from here on; the first answer is the true one."""
        await self._tell(self._is_ready())
        self._task = asyncio.create_task(self._follow(), name="health")

    async def stop(self) -> None:
        """NOT_SERVING for good."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.servicer.enter_graceful_shutdown()

    @property
    def is_alive(self) -> bool:
        return self._task is None or not self._task.done()

    async def _follow(self) -> None:
        told = self._is_ready()
        await self._tell(told)
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            if (now := self._is_ready()) != told:
                told = now
                await self._tell(now)

    async def _tell(self, is_ready: bool) -> None:
        for service in SERVICES:
            await self.servicer.set(service, SERVING if is_ready else NOT_SERVING)
