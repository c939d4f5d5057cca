"""Both doors of a router, as a replica opens them, with a fake gang behind."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import aiohttp
from grpc import aio
from prometheus_client import CollectorRegistry

from protos import inference_pb2_grpc
from router.config import RouterConfig
from router.doors import Doors
from router.metrics import RouterMetrics
from router.service import RouterService
from tests.unit.router.conftest import until
from tests.unit.router.fakes import FakeLeader, FakeRank


@dataclass
class Front:
    ranks: list[FakeRank]
    leader: FakeLeader
    core: RouterService
    doors: Doors
    registry: CollectorRegistry
    channel: aio.Channel
    inference: inference_pb2_grpc.InferenceStub
    admin: inference_pb2_grpc.AdminStub
    http: aiohttp.ClientSession

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.doors.grpc_port}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.doors.http_port}"

    @property
    def links(self):
        return [link for gang in self.core._gangs._gangs for link in gang.links.values()]

    def metric(self, name: str, **labels) -> float:
        return self.registry.get_sample_value(name, labels) or 0

    async def post(self, path: str, **body) -> tuple[int, dict]:
        """Status and JSON of one call."""
        async with self.http.post(self.url + path, json=body) as response:
            return response.status, await response.json()


@asynccontextmanager
async def open_front(config: RouterConfig, num_ranks: int = 1, wait: bool = True) -> AsyncIterator[Front]:
    async with AsyncExitStack() as stack:
        ranks = [await FakeRank(rank).start() for rank in range(num_ranks)]
        for rank in ranks:
            stack.push_async_callback(rank.die)
        leader = await FakeLeader(ranks).start()
        stack.push_async_callback(leader.stop)

        async def resolve() -> str:
            return leader.address

        registry = CollectorRegistry()
        core = RouterService(config, [resolve], RouterMetrics(registry))
        stack.push_async_callback(core.close)
        doors = Doors(core, config)
        stack.push_async_callback(doors.stop)
        await doors.start()
        channel = aio.insecure_channel(f"127.0.0.1:{doors.grpc_port}", options=[("grpc.max_send_message_length", -1)])
        stack.push_async_callback(channel.close)
        http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(30))
        stack.push_async_callback(http.close)
        front = Front(
            ranks, leader, core, doors, registry, channel,
            inference_pb2_grpc.InferenceStub(channel), inference_pb2_grpc.AdminStub(channel), http,
        )  # fmt: skip
        if wait:
            await until(lambda: all(rank.hellos for rank in ranks))
            await until(lambda: front.links and all(link.is_connected for link in front.links))
        yield front
