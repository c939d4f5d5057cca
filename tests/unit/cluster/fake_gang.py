"""Ranks that speak the leader's protocol and nothing else, and a launcher that starts them as tasks."""

import asyncio
from dataclasses import dataclass, field

import grpc

from cluster.launcher import Placed
from cluster.membership import Loss
from protos import gang_pb2, gang_pb2_grpc
from tests.unit.cluster.fake_hosts import LocalHost
from workers.config import RankConfig


@dataclass
class FakeStore:
    address: str = "127.0.0.1:1"
    closed: bool = False

    def close(self) -> None:
        self.closed = True


class FakeRank:
    """Joins, takes the epoch, is ready. `behaviour` names where it departs from that."""

    def __init__(self, config: RankConfig, behaviour: str = "") -> None:
        self.config = config
        self.behaviour = behaviour
        self.epoch: gang_pb2.Epoch | None = None
        self.prepared: gang_pb2.Prepare | None = None
        self.stop_reason = ""
        self.status: grpc.StatusCode | None = None
        self.details = ""
        self.reports: asyncio.Queue[gang_pb2.RankReport] = asyncio.Queue()

    def joined(self) -> gang_pb2.RankReport:
        config = self.config
        return gang_pb2.RankReport(
            joined=gang_pb2.Joined(
                gang_id=config.gang_id,
                rank=config.rank,
                incarnation=config.incarnation,
                pid=1000 + config.rank,
                host=config.host,
                address=f"{config.host}:{5000 + config.rank}",
            )
        )

    def fail(self, message: str, is_user_error: bool = False) -> None:
        self.reports.put_nowait(
            gang_pb2.RankReport(failed=gang_pb2.Failed(message=message, is_user_error=is_user_error))
        )

    async def run(self) -> None:
        if self.behaviour == "never joins":
            await asyncio.Event().wait()
        async with grpc.aio.insecure_channel(self.config.leader_address) as channel:
            call = gang_pb2_grpc.LeaderStub(channel).Lifeline()
            await call.write(self.joined())
            writer = asyncio.create_task(self._write(call))
            try:
                async for command in call:
                    if command.HasField("stop"):
                        self.stop_reason = command.stop.reason
                        break
                    if command.HasField("prepare"):
                        self.prepared = command.prepare
                        if self.behaviour != "never prepared":
                            self._progress(0, gang_pb2.Progress.STAGE_GROUP)
                        continue
                    self.epoch = command.epoch
                    await self._take(command.epoch.epoch)
            except grpc.aio.AioRpcError as error:
                self.status, self.details = error.code(), error.details()
            finally:
                writer.cancel()

    def _progress(self, epoch: int, stage: "gang_pb2.Progress.Stage.ValueType") -> None:
        self.reports.put_nowait(gang_pb2.RankReport(progress=gang_pb2.Progress(epoch=epoch, stage=stage)))

    async def _take(self, epoch: int) -> None:
        self.reports.put_nowait(gang_pb2.RankReport(loading=gang_pb2.Loading(bytes_read=10, bytes_total=20)))
        if self.behaviour == "bad checkpoint":
            self.fail("model.safetensors: tensor lm_head.weight is missing", is_user_error=True)
        elif self.behaviour == "enters no second epoch" and epoch > self.config.incarnation:
            pass
        elif self.behaviour not in ("never ready", "stays at weights"):
            ready = gang_pb2.EpochReady(epoch=epoch, max_model_len=1000 - self.config.rank, dtype="float32")
            self.reports.put_nowait(gang_pb2.RankReport(epoch_ready=ready))

    async def _write(self, call) -> None:
        while True:
            await call.write(await self.reports.get())


@dataclass
class FakeLauncher:
    behaviours: dict[tuple[int, int], str] = field(default_factory=dict)
    """By (rank, incarnation)."""
    hosts: tuple[str, ...] = ("127.0.0.1",) * 8
    launched: list[RankConfig] = field(default_factory=list)
    killed: list[tuple[int, int]] = field(default_factory=list)
    ranks: dict[tuple[int, int], FakeRank] = field(default_factory=dict)
    tasks: dict[tuple[int, int], asyncio.Task] = field(default_factory=dict)
    place_error: Exception | None = None
    agents: list[LocalHost] = field(default_factory=list)
    shunned: list[str] = field(default_factory=list)

    async def place(self, num_ranks: int) -> Placed:
        if self.place_error is not None:
            raise self.place_error
        return Placed(self.hosts[:num_ranks], self.agents)

    def shun(self, address: str) -> None:
        self.shunned.append(address)

    async def launch(self, config: RankConfig) -> None:
        key = config.rank, config.incarnation
        self.launched.append(config)
        self.ranks[key] = FakeRank(config, self.behaviours.get(key, ""))
        self.tasks[key] = asyncio.create_task(self.ranks[key].run())

    async def ended(self, rank: int, incarnation: int) -> Loss:
        await asyncio.wait([self.tasks[rank, incarnation]])
        return Loss("its process ended")

    async def kill(self, rank: int, incarnation: int) -> None:
        self.killed.append((rank, incarnation))
        if task := self.tasks.get((rank, incarnation)):
            task.cancel()
            await asyncio.wait([task])

    def crash(self, rank: int, incarnation: int) -> None:
        self.tasks[rank, incarnation].cancel()

    @property
    def alive(self) -> list[tuple[int, int]]:
        return [key for key, task in self.tasks.items() if not task.done()]
