"""The one verb for change of a gang that runs: reshape(members, expert maps), and the epoch grows.

    a rank is lost → it is fenced → the others enter the next epoch at once, with maps that cover every expert
                   → it is started anew and loads its weights → all enter the epoch after that

Members keep their processes, weights and KV. A loss in the middle of a reshape begins the next one. Who is dead, and
which epoch comes next, is decided here alone.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from cluster.epochs import Epochs
from cluster.errors import one_sentence
from cluster.gang_ranks import GangRanks
from cluster.leader_config import LeaderConfig
from cluster.leader_metrics import LOSSES, RESHAPE_SECONDS, RESHAPES, RETURNS
from cluster.membership import READY, Loss, Member, Membership
from protos import gang_pb2
from workers.expert_map import ExpertMap

logger = logging.getLogger("caravan.leader")

TICK_S = 0.5
SOON_S = 10.0
"""A rank that dies within so long of its return may die of something in itself."""


class Reshaper:
    """Keeps one formed gang going, from `run` to its return; on the leader's event loop.

    Args:
        expert_map: of the epoch that the gang is in.
        addresses: of each rank's host.
    """

    def __init__(
        self,
        membership: Membership,
        ranks: GangRanks,
        epochs: Epochs,
        expert_map: ExpertMap,
        addresses: Mapping[int, str],
        config: LeaderConfig,
    ) -> None:
        self._membership, self._ranks, self._epochs = membership, ranks, epochs
        self._expert_map, self._addresses, self._config = expert_map, addresses, config
        self._returns: dict[int, asyncio.Task[None]] = {}
        self._returned_at: dict[int, float] = {}
        self._relapses: defaultdict[int, int] = defaultdict(int)
        """Of each rank: losses in a row that came soon after its return."""

    async def run(self) -> Loss:
        """Reshape whenever it is due; returns why the gang cannot go on."""
        silence = asyncio.create_task(self._watch_silence(), name="silence")
        try:
            while True:
                await self._until(lambda: bool(self._membership.losses() or self._prepared()))
                if (loss := await self._reshape()) is not None:
                    return loss
        finally:
            tasks = [silence, *self._returns.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _reshape(self) -> Loss | None:
        """Until every member is in the newest epoch; None, or why that cannot be."""
        membership, lost, started = self._membership, set[int](), time.monotonic()
        # A loss on the way begins the next epoch.
        while (losses := membership.losses()) or self._prepared():
            for member, loss in losses:
                logger.warning("rank %d is lost in epoch %d: %s", member.rank, membership.epoch, loss.message)
                lost.add(member.rank)
            members = {rank: member for rank, member in membership.members.items() if member.loss is None}
            members |= {member.rank: member for member in self._prepared()}
            for member, loss in losses:
                if loss.is_user_error or len(members) < self._config.fewest_ranks:
                    return Loss(f"rank {member.rank}: {one_sentence(loss.message)}", loss.is_user_error)
            try:
                await self._change([member for member, _ in losses], members)
            except TimeoutError:
                return Loss(f"rank {losses[0][0].rank} was lost, and its process could not be ended")
        RESHAPES.labels(membership.gang_id).inc()
        ranks = ", ".join(map(str, sorted(membership.members)))
        logger.warning("epoch %d: ranks %s, after %.3f s", membership.epoch, ranks, time.monotonic() - started)
        membership.settle(READY, self._detail())
        for rank in lost - membership.members.keys() - self._returns.keys():
            self._returns[rank] = asyncio.create_task(self._bring_back(rank), name=f"return of rank {rank}")
        return None

    async def _change(self, dead: Sequence[Member], members: Mapping[int, Member]) -> None:
        """One epoch: fence, cover every expert, tell everybody, and wait until they are in it or another is lost.

        Raises:
            TimeoutError: a process could not be ended.
        """
        membership, gang = self._membership, self._membership.gang_id
        for member in dead:
            LOSSES.labels(gang, member.loss.reason if member.loss is not None else "").inc()
        returned = members.keys() - membership.members.keys()
        self._returned_at |= dict.fromkeys(returned, time.monotonic())
        RETURNS.labels(gang).inc(len(returned))
        with RESHAPE_SECONDS.labels(gang, "fence").time():
            await self._ranks.fence(dead)
        self._expert_map = self._expert_map.over(sorted(members))
        for rank, member in members.items():
            member.experts = self._expert_map.most_experts(rank)
        membership.reshape(membership.epoch + 1, members.values())
        membership.detail = self._detail()
        with RESHAPE_SECONDS.labels(gang, "enter").time():
            await self._epochs.begin(membership.epoch, members.values(), self._expert_map)
            await self._entered()

    async def _entered(self) -> None:
        """Until all members are in the epoch, or one is lost; who does not come in time is."""
        membership, bound_s = self._membership, self._config.reshape_timeout_s

        def is_over() -> bool:
            return bool(membership.losses()) or not membership.lacking(lambda member: member.ready is not None)

        if not await self._until(is_over, bound_s):
            for rank in membership.lacking(lambda member: member.ready is not None):
                message = f"it did not enter epoch {membership.epoch} within {bound_s:g} s"
                membership.record_loss(rank, membership.members[rank].incarnation, Loss(message, reason="late"))

    async def _bring_back(self, rank: int) -> None:
        """Start a lost rank anew, until it has its weights; then the next reshape takes it in. One that dies soon after
        its return, again and again, waits longer each time: every return costs the others a moment."""
        config = self._config
        soon = time.monotonic() - self._returned_at.get(rank, -math.inf) < SOON_S
        self._relapses[rank] = self._relapses[rank] + 1 if soon else 0
        try:
            for attempt in range(config.restarts):
                delay_s = config.restart_delay_s * 2.0 ** (self._relapses[rank] + attempt)
                await asyncio.sleep(min(delay_s, config.restart_window_s))
                member = Member(rank, self._membership.next_incarnation())
                self._membership.joining[rank] = member
                try:
                    await self._prepare(member)
                    return
                except (RuntimeError, OSError, TimeoutError) as error:
                    logger.warning("rank %d, incarnation %d: %s", rank, member.incarnation, one_sentence(error))
                    with contextlib.suppress(TimeoutError):
                        await self._ranks.fence([member])
                    self._membership.joining.pop(rank, None)
                    self._membership.notify()
            self._membership.settle(self._membership.state, self._detail())
        finally:
            self._returns.pop(rank, None)

    async def _prepare(self, member: Member) -> None:
        config, membership = self._config, self._membership
        address = self._addresses[member.rank]
        on_host = sum(other == address for other in self._addresses.values())
        await self._ranks.launch(member, address, on_host)

        async def reach(has: Callable[[], bool], bound_s: float, what: str) -> None:
            if not await self._until(lambda: has() or member.loss is not None, bound_s):
                raise TimeoutError(f"it has not {what} within {bound_s:g} s")
            if member.loss is not None:
                raise RuntimeError(member.loss.message)

        await reach(lambda: member.joined is not None, config.join_timeout_s, "joined the gang")
        layers = self._expert_map.over(sorted({*membership.members, member.rank})).to_proto()
        member.commands.put_nowait(gang_pb2.LeaderCommand(prepare=gang_pb2.Prepare(layers=layers)))
        await reach(
            lambda: member.is_at(gang_pb2.Progress.STAGE_GROUP), config.load_stall_timeout_s, "loaded its weights"
        )

    def _prepared(self) -> list[Member]:
        """Ranks that wait to be taken in."""
        joining = self._membership.joining.values()
        return [member for member in joining if member.loss is None and _has_weights(member)]

    def _detail(self) -> str:
        missing = sorted(self._addresses.keys() - self._membership.members.keys())
        return f"without rank {', '.join(map(str, missing))}" if missing else ""

    async def _watch_silence(self) -> None:
        """A rank that runs reports every second, from a thread of its own; one that does not is stuck."""
        checked = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            # If it was this process that stood still, nobody else is to blame.
            slept, checked = now - checked - TICK_S, now
            for member in list(self._membership.members.values()):
                if slept > TICK_S:
                    member.heard_at = now
                silent_s = now - member.heard_at
                if member.ready is not None and member.loss is None and silent_s > self._config.rank_silence_s:
                    loss = Loss(f"its process is stuck: silent for {silent_s:.1f} s", reason="stuck")
                    self._membership.record_loss(member.rank, member.incarnation, loss)

    async def _until(self, is_over: Callable[[], bool], bound_s: float = float("inf")) -> bool:
        """Wait for it; False where it did not come within `bound_s`."""
        membership, deadline = self._membership, time.monotonic() + bound_s
        version = membership.version
        while not is_over():
            if (left := deadline - time.monotonic()) <= 0:
                return False
            version = await membership.changed_since(version, timeout_s=min(60.0, left))
        return True


def _has_weights(member: Member) -> bool:
    return member.is_at(gang_pb2.Progress.STAGE_GROUP)
