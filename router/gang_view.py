"""A gang as its leader tells it: the newest view, kept through the leader's absence."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from grpc import aio

from protos import gang_pb2, gang_pb2_grpc

logger = logging.getLogger(__name__)

LeaderResolver = Callable[[], Awaitable[str]]
"""Finds the leader's HOST:PORT, anew for every attempt: the next leader may be elsewhere."""

FIRST_PAUSE_S = 0.05


class GangWatcher:
    """Follows one gang's leader for as long as the router lives.

    Args:
        router_id: this router's name.
        resolve: finds the leader.
        on_view: gets every view, in order.
        silence_s: seconds without a view before the connection counts as lost.
        reconnect_max_s: longest pause between two attempts.
    """

    def __init__(
        self,
        router_id: str,
        resolve: LeaderResolver,
        on_view: Callable[[gang_pb2.GangView], None],
        silence_s: float,
        reconnect_max_s: float,
    ) -> None:
        self._router_id = router_id
        self._resolve = resolve
        self._on_view = on_view
        self._silence_s = silence_s
        self._reconnect_max_s = reconnect_max_s
        self.problem = "its leader has not been reached yet"
        """Why there is no news; empty while there is."""

    async def run(self) -> None:
        """Watches, and connects again after every loss. Ends by cancellation only."""
        pause = FIRST_PAUSE_S
        while True:
            address = "?"
            try:
                async with asyncio.timeout(self._silence_s):
                    address = await self._resolve()
                await self._watch(address)
                problem = "it ended the watch"
            except TimeoutError:
                problem = f"no word in {self._silence_s:g} s"
            except aio.AioRpcError as error:
                problem = f"{error.code().name}: {error.details()}"
            except Exception as error:  # The resolver is a call through Ray: it may raise anything.
                problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if not self.problem:
                logger.warning("lost the leader at %s: %s", address, problem)
                pause = FIRST_PAUSE_S
            self.problem = f"its leader at {address} cannot be reached ({problem})"
            await asyncio.sleep(pause)
            pause = min(pause * 2, self._reconnect_max_s)

    async def _watch(self, address: str) -> None:
        async with aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            call = gang_pb2_grpc.LeaderStub(channel).Watch(gang_pb2.WatchRequest(router_id=self._router_id))
            while True:
                async with asyncio.timeout(self._silence_s):
                    view = await call.read()
                if not isinstance(view, gang_pb2.GangView):  # The end of the stream.
                    return
                self.problem = ""
                self._on_view(view)
