"""A leader and a router small enough for tests, and ranks in plain processes: a gang without Ray."""

import asyncio
import logging
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import psutil

from protos import gang_pb2, gang_pb2_grpc, inference_pb2
from tests.distributed.processes import context
from tests.local_engine import engine_config
from workers.config import EngineConfig, RankConfig
from workers.errors import UserError
from workers.expert_map import ExpertMap
from workers.model_config import ModelConfig
from workers.rank import Rank
from workers.rendezvous import RendezvousStore

HOST = "127.0.0.1"
GANG = "gang-1"
EPOCH = 1


def run_rank(config: RankConfig) -> None:
    """A rank's process; exit codes as a supervisor wants them: 0 stopped, 2 the user's fault, 1 anything else."""
    logging.disable(logging.CRITICAL)
    try:
        Rank(config).run()
    except UserError:
        os._exit(2)
    except Exception:
        os._exit(1)
    os._exit(0)


class Leader(gang_pb2_grpc.LeaderServicer):
    """Keeps every report and says what it is told to say."""

    def __init__(self) -> None:
        self.reports: dict[int, list[gang_pb2.RankReport]] = defaultdict(list)
        self.lost: set[int] = set()
        """Ranks whose lifeline has ended."""
        self._commands: dict[int, asyncio.Queue[gang_pb2.LeaderCommand]] = defaultdict(asyncio.Queue)
        self._changed = asyncio.Condition()
        self._server = grpc.aio.server()
        gang_pb2_grpc.add_LeaderServicer_to_server(self, self._server)
        self.address = f"{HOST}:{self._server.add_insecure_port(f'{HOST}:0')}"

    async def start(self) -> None:
        await self._server.start()

    async def close(self) -> None:
        await self._server.stop(0)

    async def Lifeline(self, request_iterator: Any, context: Any) -> AsyncIterator[gang_pb2.LeaderCommand]:
        first = await anext(aiter(request_iterator))
        rank = first.joined.rank
        # What was meant for an earlier incarnation is not for this one.
        self._commands[rank] = commands = asyncio.Queue()
        self.lost.discard(rank)
        await self._report(rank, first)
        reader = asyncio.create_task(self._read(rank, request_iterator))
        try:
            while True:
                yield await commands.get()
        finally:
            reader.cancel()

    def command(self, rank: int, **command: Any) -> None:
        self._commands[rank].put_nowait(gang_pb2.LeaderCommand(**command))

    def all_of(self, rank: int, kind: str) -> list[Any]:
        """The reports of one kind of one rank so far."""
        return [getattr(report, kind) for report in self.reports[rank] if report.WhichOneof("message") == kind]

    def last(self, rank: int, kind: str) -> Any | None:
        reports = self.all_of(rank, kind)
        return reports[-1] if reports else None

    async def wait(self, what: str, condition: Callable[[], object], timeout_s: float = 30.0) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                async with self._changed:
                    await self._changed.wait_for(lambda: bool(condition()))
        except TimeoutError:
            kinds = {rank: [r.WhichOneof("message") for r in reports][-5:] for rank, reports in self.reports.items()}
            failures = [failed.message for rank in list(self.reports) for failed in self.all_of(rank, "failed")]
            raise AssertionError(f"no {what} within {timeout_s} s; reports: {kinds}; failures: {failures}") from None

    async def _read(self, rank: int, reports: Any) -> None:
        try:
            async for report in reports:
                await self._report(rank, report)
        finally:
            self.lost.add(rank)
            async with self._changed:
                self._changed.notify_all()

    async def _report(self, rank: int, report: gang_pb2.RankReport) -> None:
        async with self._changed:
            self.reports[rank].append(report)
            self._changed.notify_all()


@dataclass
class Gang:
    leader: Leader
    store: RendezvousStore | None
    """Where ranks need one."""
    config: EngineConfig
    processes: dict[int, Any]
    """By rank: of its newest incarnation."""
    configs: dict[int, RankConfig]
    expert_map: ExpertMap | None = None
    """Of the newest epoch."""
    replaced: list[Any] = field(default_factory=list)
    """Processes of older incarnations."""

    @property
    def ranks(self) -> list[int]:
        return list(self.processes)

    async def joined(self) -> None:
        await self.leader.wait("join", lambda: all(self.leader.all_of(rank, "joined") for rank in self.ranks))

    async def kill(self, *ranks: int, wait: bool = True) -> None:
        """SIGKILL; with `wait`, until their lifelines have ended."""
        for rank in ranks:
            self.processes[rank].kill()
        if wait:
            await self.leader.wait("end of lifelines", lambda: self.leader.lost >= set(ranks))

    async def respawn(self, rank: int) -> None:
        """Start a rank's next incarnation, until it has joined."""
        self.replaced.append(self.processes[rank])
        before = len(self.leader.all_of(rank, "joined"))
        self.configs[rank] = replace(self.configs[rank], incarnation=self.configs[rank].incarnation + 10)
        self.processes[rank] = context.Process(target=run_rank, args=(self.configs[rank],), daemon=True)
        self.processes[rank].start()
        await self.leader.wait("join", lambda: len(self.leader.all_of(rank, "joined")) > before)

    async def prepare(self, rank: int, members: Sequence[int]) -> None:
        """Have a rank load what it will need beside these others, until it has."""
        assert self.expert_map is not None
        layers = self.expert_map.over(sorted({*members, rank})).to_proto()
        self.leader.command(rank, prepare=gang_pb2.Prepare(layers=layers))
        await self.leader.wait(
            "preparation",
            lambda: any(
                progress.epoch == 0 and progress.stage == gang_pb2.Progress.STAGE_GROUP
                for progress in self.leader.all_of(rank, "progress")
            ),
        )

    def open_epoch(
        self, expert_map: ExpertMap | None = None, epoch: int = EPOCH, members: Sequence[int] | None = None
    ) -> None:
        """Tell every member of the epoch; members are in descending order. Later epochs have the map that follows from
        the one before."""
        model = ModelConfig.from_folder(self.config.model_dir)
        ranks = sorted(self.ranks if members is None else members, reverse=True)
        if expert_map is None and self.expert_map is not None:
            expert_map = self.expert_map.over(sorted(ranks))
        self.expert_map = expert_map or ExpertMap.even(model.num_moe_layers, model.num_experts, self.ranks)
        joined = [self.leader.last(rank, "joined") for rank in ranks]
        command = gang_pb2.Epoch(
            epoch=epoch,
            members=[
                gang_pb2.Member(
                    rank=member.rank,
                    incarnation=member.incarnation,
                    address=member.address,
                    host=member.host,
                    exchange_address=member.exchange_address,
                )
                for member in joined
            ],
            store_address=self.store.address if self.store else "",
            layers=self.expert_map.to_proto(),
        )
        for rank in ranks:
            self.leader.command(rank, epoch=command)

    async def reshape(self, epoch: int, members: Sequence[int], timeout_s: float = 30.0) -> None:
        """Begin an epoch, until every member is in it."""
        self.open_epoch(epoch=epoch, members=members)
        await self.entered(epoch, members, timeout_s)

    async def entered(self, epoch: int, members: Sequence[int], timeout_s: float = 30.0) -> None:
        def is_entered() -> bool:
            return all(
                any(ready.epoch == epoch for ready in self.leader.all_of(rank, "epoch_ready")) for rank in members
            )

        await self.leader.wait(f"entry to epoch {epoch}", is_entered, timeout_s)

    async def ready(self) -> None:
        leader = self.leader
        await leader.wait("readiness", lambda: all(leader.all_of(rank, "epoch_ready") for rank in self.ranks))

    async def idle(self, timeout_s: float = 15.0) -> None:
        """Wait until every rank's newest load is of nothing at all."""

        def is_idle() -> bool:
            loads = [self.leader.last(rank, "load") for rank in self.ranks]
            return all(
                load and not (load.running or load.waiting or load.pending_tokens or load.kv_usage_ratio)
                for load in loads
            )

        await self.leader.wait("idle gang", is_idle, timeout_s)

    def stop(self) -> None:
        for rank in self.ranks:
            self.leader.command(rank, stop=gang_pb2.Stop(reason="test"))

    async def exit_codes(self, timeout_s: float) -> dict[int, int | None]:
        """Exit code of each process, None for one that has not ended in time."""
        deadline = time.monotonic() + timeout_s
        while any(process.exitcode is None for process in self.processes.values()) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return {rank: process.exitcode for rank, process in self.processes.items()}

    def cpu_seconds(self) -> dict[int, float]:
        times = {rank: psutil.Process(process.pid).cpu_times() for rank, process in self.processes.items()}
        return {rank: used.user + used.system for rank, used in times.items()}


@asynccontextmanager
async def start_gang(
    folder: Path,
    size: int,
    wait: bool = True,
    folders: dict[int, Path] | None = None,
    hosts: Sequence[str] = (),
    lifeline_timeout_s: float = 20.0,
    **config: Any,
) -> AsyncIterator[Gang]:
    """Ranks 0 to size - 1, joined and, with `wait`, ready. Whatever happens, no process is left.

    Args:
        folders: other checkpoints for some ranks.
        lifeline_timeout_s: that a rank gives its leader to answer.
        hosts: address of each rank's host; empty: all are on one.
        config: of the engines.
    """
    engine, hosts = engine_config(folder, **config), hosts or [HOST] * size
    leader, store = Leader(), RendezvousStore(HOST) if engine.needs_store else None
    await leader.start()
    processes, configs = {}, {}
    for rank in range(size):
        own = replace(engine, model_dir=(folders or {}).get(rank, folder))
        configs[rank] = RankConfig(
            gang_id=GANG,
            rank=rank,
            incarnation=10 + rank,
            leader_address=leader.address,
            host=hosts[rank],
            ranks_on_host=hosts.count(hosts[rank]),
            engine=own,
            lifeline_timeout_s=lifeline_timeout_s,
        )
        processes[rank] = context.Process(target=run_rank, args=(configs[rank],), daemon=True)
        processes[rank].start()
    gang = Gang(leader, store, engine, processes, configs)
    try:
        await gang.joined()
        if wait:
            gang.open_epoch()
            await gang.ready()
        yield gang
    finally:
        for process in (*gang.replaced, *gang.processes.values()):
            process.kill()
            process.join(10)
        await leader.close()
        if store:
            store.close()


class Router:
    """One stream to one rank."""

    def __init__(self, gang: Gang, rank: int, name: str = "router-1") -> None:
        self.outputs: dict[int, list[int]] = defaultdict(list)
        self.finished: dict[int, gang_pb2.SequenceOutput] = {}
        self.messages: list[gang_pb2.StepOutput] = []
        self._channel = grpc.aio.insecure_channel(gang.leader.last(rank, "joined").address)
        self._queue: asyncio.Queue[gang_pb2.RouterMessage] = asyncio.Queue()
        self._say(hello=gang_pb2.Hello(router_id=name, gang_id=GANG, epoch=EPOCH))
        self._changed = asyncio.Condition()
        self._call = gang_pb2_grpc.RankStub(self._channel).Connect(self._outgoing())
        self._reader = asyncio.create_task(self._read())

    def submit(self, number: int, prompt_ids: list[int], max_tokens: int, **changes: Any) -> None:
        sampling = gang_pb2.Sampling(temperature=0.0, top_p=1.0, repetition_penalty=1.0)
        fields = {"epoch": EPOCH, "sampling": sampling, **changes}
        self._say(submit=gang_pb2.Submit(sequence_id=number, prompt_ids=prompt_ids, max_tokens=max_tokens, **fields))

    def abort(self, number: int) -> None:
        self._say(abort=gang_pb2.Abort(sequence_id=number))

    async def wait(self, what: str, condition: Callable[[], object], timeout_s: float = 60.0) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                async with self._changed:
                    await self._changed.wait_for(lambda: bool(condition()) or self._reader.done())
        except TimeoutError:
            raise AssertionError(f"no {what} within {timeout_s} s") from None
        assert condition(), f"no {what}: the stream ended"

    async def all_finished(self, numbers: list[int], timeout_s: float = 60.0) -> None:
        await self.wait(f"end of {len(numbers)} streams", lambda: set(numbers) <= set(self.finished), timeout_s)

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()
        await asyncio.wait([self._reader], timeout=5)

    async def _read(self) -> None:
        try:
            async for message in self._call:
                async with self._changed:
                    self.messages.append(message)
                    for output in message.outputs:
                        assert output.sequence_id not in self.finished, "a token after the last"
                        self.outputs[output.sequence_id] += output.token_ids
                        if output.finish_reason != inference_pb2.FINISH_REASON_UNSPECIFIED:
                            self.finished[output.sequence_id] = output
                    self._changed.notify_all()
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            pass
        finally:
            async with self._changed:
                self._changed.notify_all()

    async def _outgoing(self) -> AsyncIterator[gang_pb2.RouterMessage]:
        while True:
            yield await self._queue.get()

    def _say(self, **message: Any) -> None:
        self._queue.put_nowait(gang_pb2.RouterMessage(**message))
