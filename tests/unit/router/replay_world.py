"""A router among ranks that lose their way, on a clock of its own: no sockets, and nothing happens untold.

The router is the real one from its service down to its links; a link's conversation alone is replaced by two queues. A
rank's next token is a function of all that a real one's depends on: prompt and output, which is which, the seed, the
sibling, the parameters. So a stream that goes on with anything wrong goes on with other tokens.
"""

import asyncio
import selectors
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import pytest
from grpc import aio
from prometheus_client import CollectorRegistry

from protos import gang_pb2, inference_pb2
from protos.client import Completion, add_response
from protos.errors import CaravanError
from router import dispatcher, gang_view, generation, job, rank_link, replay, service
from router.config import RouterConfig
from router.metrics import RouterMetrics
from router.rank_link import RankLink
from router.service import RouterService
from tests.unit.router.replay_rank import Rank, Wire


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time jumps to the next timer when there is nothing else to do."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(selectors.SelectSelector())

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and (due := [timer._when for timer in self._scheduled if not timer.cancelled()]):
            self.now = max(self.now, min(due))
        super()._run_once()


@dataclass(eq=False)
class Call:
    """One client's call, and what came of it."""

    request: inference_pb2.GenerateRequest
    done: Completion = field(default_factory=Completion)
    error: CaravanError | None = None
    task: asyncio.Task[None] | None = None

    async def run(self, core: RouterService) -> None:
        try:
            async for response in core.generate(self.request):
                add_response(self.done, response)
        except CaravanError as error:
            self.error = error

    @property
    def is_over(self) -> bool:
        return self.task is not None and self.task.done()


class World:
    """Gangs of two ranks behind one router."""

    def __init__(self, config: RouterConfig, num_gangs: int = 1, num_ranks: int = 2) -> None:
        self.registry = CollectorRegistry()
        resolvers = [_nowhere] * num_gangs
        self.core = RouterService(config, resolvers, RouterMetrics(self.registry))
        self.epochs = [1] * num_gangs
        self.dtypes = ["float32"] * num_gangs
        self.states = ["ready"] * num_gangs
        self.ranks = [
            [Rank(f"gang-{g}", r, 1, 1, f"{g}.{r}.1") for r in range(num_ranks)] for g in range(num_gangs)
        ]  # fmt: skip
        self.calls: list[Call] = []
        self.late: list[tuple[Rank, gang_pb2.StepOutput]] = []

    # ---- what the leaders do ---------------------------------------------------------------------------------------

    def view(self, gang: int = 0) -> None:
        """The leader tells the truth."""
        view = gang_pb2.GangView(
            gang_id=f"gang-{gang}", epoch=self.epochs[gang], state=self.states[gang], max_model_len=256,
            dtype=self.dtypes[gang], detail="out of memory" if self.states[gang] == "failed" else "",
        )  # fmt: skip
        for rank in self.ranks[gang]:
            state = "ready" if rank.is_alive else "dead"
            view.ranks.add(
                rank=rank.rank, incarnation=rank.incarnation, address=rank.address, state=state, load=rank.load
            )  # fmt: skip
        self.core._gangs._gangs[gang].take_view(view)

    def reshape(self, gang: int = 0, at_once: bool = True) -> None:
        """The next epoch: the dead have successors, the living keep what they have and enter it now or later."""
        self.epochs[gang] += 1
        for number, rank in enumerate(self.ranks[gang]):
            if not rank.is_alive:
                incarnation = self.epochs[gang]
                self.ranks[gang][number] = Rank(
                    rank.gang, number, incarnation, incarnation, f"{gang}.{number}.{incarnation}",
                    max_num_seqs=rank.max_num_seqs,
                )  # fmt: skip
            elif at_once:
                rank.epoch = self.epochs[gang]

    # ---- what befalls ranks and wires ------------------------------------------------------------------------------

    def cut(self, rank: Rank, is_late: bool = False) -> None:
        """The connection is lost; `is_late`: what was on its way comes with the next one."""
        wire, rank.wire = rank.wire, None
        rank.sequences.clear()
        if wire is not None:
            if is_late:
                self.late += [(rank, message) for message in wire.down]
            if not wire.end.done():
                wire.end.set_result(None)

    def kill(self, rank: Rank) -> None:
        rank.is_alive = False
        self.cut(rank)

    def deliver(self, rank: Rank) -> None:
        """One message comes to the router."""
        if rank.wire is not None and rank.wire.down:
            rank.wire.link._dispatch(rank.wire.down.popleft())

    def at(self, address: str) -> Rank | None:
        return next((rank for gang in self.ranks for rank in gang if rank.address == address and rank.is_alive), None)

    async def converse(self, link: RankLink) -> None:
        """In place of RankLink._converse."""
        rank = self.at(link.address)
        if rank is None or rank.wire is not None:
            raise aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, aio.Metadata(), aio.Metadata(), "nobody is there")
        wire = rank.wire = Wire(link, link._outbox, asyncio.get_running_loop().create_future())
        wire.down.extend(message for other, message in self.late if other is rank)
        self.late = [(other, message) for other, message in self.late if other is not rank]
        link.is_connected = True
        link._on_change()
        try:
            await wire.end
        finally:
            if rank.wire is wire:
                self.cut(rank)

    # ---- the whole -------------------------------------------------------------------------------------------------

    def call(self, request: inference_pb2.GenerateRequest) -> Call:
        call = Call(request)
        call.task = asyncio.create_task(call.run(self.core))
        self.calls.append(call)
        return call

    async def settle(self) -> None:
        """Until every task that could go on has; no time passes."""
        for _ in range(12):
            await asyncio.sleep(0)

    async def start(self) -> None:
        for gang in range(len(self.ranks)):
            self.view(gang)
        await self.settle()

    async def turn(self) -> None:
        """Everybody does all they can: one step."""
        for gang in self.ranks:
            for rank in gang:
                if rank.is_alive:
                    rank.hear()
                    rank.step()
                while rank.wire is not None and rank.wire.down:
                    self.deliver(rank)
        await self.settle()

    async def heal(self) -> None:
        """All ranks live, every leader says so, and everything goes on until all calls are over."""
        for gang in range(len(self.ranks)):
            self.reshape(gang)
            self.view(gang)
        for _ in range(400):
            await asyncio.sleep(0.02)
            await self.turn()
            if all(call.is_over for call in self.calls):
                break
        await asyncio.sleep(0.1)
        await self.turn()

    def check_nothing_is_left(self) -> None:
        dispatcher = self.core._dispatcher
        admission = dispatcher._admission
        assert all(call.is_over for call in self.calls), "a call never ended"
        assert len(dispatcher._replays) == 0 and not dispatcher._replays._lines
        assert admission.queue.total == 0 and admission._num_started == 0
        assert dispatcher._bound is None
        assert not self.core._registry._running
        assert self.registry.get_sample_value("caravan_streams_running") == 0
        for gang in self.core._gangs._gangs:
            assert not any(link._streams or link._submitted for link in gang.links.values())
        for gang in self.ranks:
            assert not any(rank.sequences for rank in gang), "a rank works for nobody"

    def metric(self, name: str, **labels) -> float:
        return self.registry.get_sample_value(name, labels) or 0


async def _nowhere() -> str:
    return ""


@contextmanager
def open_world() -> Iterator[Clock]:
    """A loop for one world; `World` must be made inside it."""
    loop = Clock()
    asyncio.set_event_loop(loop)
    clock = types.SimpleNamespace(monotonic=loop.time, perf_counter=loop.time, time=loop.time)
    worlds: list[World] = []

    async def converse(link: RankLink) -> None:
        await worlds[0].converse(link)

    async def never(self) -> None:
        await asyncio.Event().wait()

    with pytest.MonkeyPatch.context() as patch:
        for module in (dispatcher, generation, job, rank_link, replay, service):
            patch.setattr(module, "time", clock)
        patch.setattr(RankLink, "_converse", converse)
        patch.setattr(gang_view.GangWatcher, "run", never)
        patch.setattr(service, "checkpoint_digest", lambda *_: "")
        make = World.__init__

        def remember(self: World, *arguments, **more) -> None:
            make(self, *arguments, **more)
            worlds.append(self)

        patch.setattr(World, "__init__", remember)
        try:
            yield loop
        finally:
            if worlds:
                loop.run_until_complete(worlds[0].core.close())
                loop.run_until_complete(worlds[0].settle())
            loop.run_until_complete(loop.shutdown_default_executor())
            asyncio.set_event_loop(None)
            loop.close()
