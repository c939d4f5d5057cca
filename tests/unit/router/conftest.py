import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from grpc import aio
from prometheus_client import CollectorRegistry

from protos import inference_pb2, inference_pb2_grpc
from router import service as service_module
from router.config import RouterConfig
from router.grpc_service import GrpcService
from router.metrics import RouterMetrics
from router.model_info import ModelInfo
from router.service import RouterService
from router.tokenizer import Tokenizer
from tests.unit.router.fakes import FakeLeader, FakeRank
from tests.unit.router.replay_world import World, open_world
from tests.unit.router.tiny_checkpoint import EOT, build_tokenizer, write_checkpoint


async def until(condition: Callable[[], object], seconds: float = 5) -> None:
    """Waits until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(build_tokenizer())


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", eos_token_id=[1, EOT], temperature=0.6)


@pytest.fixture
def config(checkpoint) -> RouterConfig:
    return RouterConfig(model_dir=checkpoint, reconnect_max_s=0.1)


@pytest.fixture
def model(checkpoint) -> ModelInfo:
    return ModelInfo.from_folder(checkpoint)


@dataclass
class House:
    """A router behind a plain gRPC server, with a fake gang behind it."""

    ranks: list[FakeRank]
    leader: FakeLeader
    service: RouterService
    registry: CollectorRegistry
    inference: inference_pb2_grpc.InferenceStub
    admin: inference_pb2_grpc.AdminStub
    address: str
    config: RouterConfig
    closers: list[Callable[[], Awaitable[None]]] = field(default_factory=list)

    async def another_router(self) -> tuple[RouterService, str]:
        """One more router before the same gang, and its address."""
        service, server, address, _ = await serve(self.config, self.leader)

        async def close() -> None:
            await server.stop(0)
            await service.close()

        self.closers.insert(0, close)
        await until(lambda: service.is_ready)
        return service, address

    async def ready(self) -> None:
        await until(lambda: all(rank.hellos for rank in self.ranks))
        await until(lambda: all(link.is_connected for link in self.links))

    @property
    def links(self):
        return [link for gang in self.service._gangs._gangs for link in gang.links.values()]

    async def generate(self, **request) -> list[inference_pb2.GenerateResponse]:
        return [r async for r in self.inference.Generate(inference_pb2.GenerateRequest(**request), timeout=20)]


async def serve(config: RouterConfig, leader: FakeLeader) -> tuple[RouterService, aio.Server, str, CollectorRegistry]:
    async def resolve() -> str:
        return leader.address

    registry = CollectorRegistry()
    service = RouterService(config, [resolve], RouterMetrics(registry))
    server = aio.server(options=[("grpc.max_receive_message_length", -1)])
    inference_pb2_grpc.add_InferenceServicer_to_server(GrpcService(service), server)
    inference_pb2_grpc.add_AdminServicer_to_server(GrpcService(service), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    return service, server, address, registry


@pytest.fixture
async def build(config) -> AsyncIterator[Callable[..., Awaitable[House]]]:
    houses: list[House] = []

    async def make(num_ranks: int = 1, config: RouterConfig = config, wait: bool = True) -> House:
        ranks = [await FakeRank(rank).start() for rank in range(num_ranks)]
        leader = await FakeLeader(ranks).start()

        service, server, address, registry = await serve(config, leader)
        channel = aio.insecure_channel(address, options=[("grpc.max_send_message_length", -1)])

        async def close() -> None:
            await channel.close()
            await server.stop(0)
            await service.close()
            await leader.stop()
            for rank in ranks:
                await rank.die()

        house = House(
            ranks, leader, service, registry,
            inference_pb2_grpc.InferenceStub(channel), inference_pb2_grpc.AdminStub(channel), address, config, [close],
        )  # fmt: skip
        houses.append(house)
        if wait:
            await house.ready()
        return house

    yield make
    for house in houses:
        for close in house.closers:
            await close()


@pytest.fixture
async def house(build) -> House:
    return await build()


@pytest.fixture(scope="module")
def play(checkpoint):
    """Runs a scene in a world of its own, on its own clock."""
    loaded = service_module.load(RouterConfig(model_dir=checkpoint))

    def run(scene: Callable[[World], Awaitable[None]], num_gangs: int = 1, num_ranks: int = 2, **config) -> None:
        async def whole() -> None:
            world = World(RouterConfig(model_dir=checkpoint, **config), num_gangs, num_ranks)
            await world.start()
            await scene(world)

        with open_world() as loop:
            loop.run_until_complete(whole())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service_module, "load", lambda config: loaded)
        yield run
