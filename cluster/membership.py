"""What a leader knows of its gang: one record a rank, and the view of it all that routers and operators see."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from protos import gang_pb2

STARTING, LOADING, READY, DEAD, FAILED = "starting", "loading", "ready", "dead", "failed"


@dataclass(frozen=True)
class Loss:
    """Why a rank no longer counts."""

    message: str
    """One sentence."""
    is_user_error: bool = False
    """The user's input is at fault: starting again would not help."""
    is_final: bool = False
    """Starting again would not help, though the user's input is not at fault."""
    reason: str = "died"
    """For counting: died, stuck (alive, but silent), late (not in an epoch in time), host, or failed (it said so)."""
    is_told: bool = False
    """The rank said so itself; else its process or its lifeline ended without a word."""


@dataclass
class Member:
    """One incarnation of one rank, as its leader sees it."""

    rank: int
    incarnation: int
    joined: gang_pb2.Joined | None = None
    loading: gang_pb2.Loading | None = None
    progress: gang_pb2.Progress | None = None
    ready: gang_pb2.EpochReady | None = None
    load: gang_pb2.RankLoad | None = None
    loss: Loss | None = None
    lost_at: int = 0
    """`Membership.version` when it was lost."""
    experts: int = 0
    """Most logical experts of one MoE layer with a replica here."""
    address: str = ""
    """Of its host, as ranks reach it; empty before it is known where the rank goes."""
    host: str = ""
    """The same as a person calls it."""
    heard_at: float = 0.0
    """Of its last report, by time.monotonic."""
    has_served: bool = False
    """It was ready in some epoch. In the next it is still the one it was: its sequences go on."""
    commands: asyncio.Queue[gang_pb2.LeaderCommand] = field(default_factory=asyncio.Queue)
    """What its lifeline is still to carry down."""

    @property
    def state(self) -> str:
        if self.loss is not None:
            return DEAD
        if self.ready is not None or self.has_served:
            return READY
        return LOADING if self.loading is not None else STARTING

    def is_at(self, stage: "gang_pb2.Progress.Stage.ValueType") -> bool:
        """Has it come as far as that in this epoch, or further?"""
        return self.ready is not None or (self.progress is not None and self.progress.stage >= stage)

    def view(self) -> gang_pb2.RankView:
        joined = self.joined or gang_pb2.Joined()
        return gang_pb2.RankView(
            rank=self.rank,
            incarnation=self.incarnation,
            pid=joined.pid,
            host=joined.host,
            address=joined.address,
            state=self.state,
            experts=self.experts,
            load=self.load,
            loading=self.loading,
        )


class Membership:
    """The members of one epoch of a gang, and the gang's state. Every change wakes those who wait for one.

    Belongs to one event loop; no method may be called from outside it.
    """

    def __init__(self, gang_id: str) -> None:
        self.gang_id = gang_id
        self.epoch = 0
        self.state = STARTING
        self.stage = ""
        """Of the start, while `state` is "starting"."""
        self.detail = ""
        self.is_user_error = False
        self.version = 0
        """Grows with every change of state; mere numbers (load, bytes read) change without it."""
        self.members: dict[int, Member] = {}
        self.joining: dict[int, Member] = {}
        """Ranks that are to become members with a later epoch."""
        self._max_model_len, self._dtype = 0, ""
        self._last_incarnation = 0
        self.host_views: Callable[[], list[gang_pb2.HostView]] = list
        """Of the gang's hosts, now."""
        self._changed = asyncio.Event()

    def next_incarnation(self) -> int:
        """Newer than any before, and no older than the epoch that follows."""
        self._last_incarnation = max(self._last_incarnation, self.epoch) + 1
        return self._last_incarnation

    def begin(self, epoch: int, incarnations: dict[int, int]) -> None:
        """A new epoch with nobody joined yet: `incarnations` by rank."""
        if epoch <= self.epoch:
            raise ValueError(f"epochs only grow: {epoch} after {self.epoch}")
        self.epoch = epoch
        self.state, self.stage, self.detail = STARTING, "", ""
        self.members = {rank: Member(rank, incarnation) for rank, incarnation in incarnations.items()}
        self.joining = {}
        self.notify()

    def reshape(self, epoch: int, members: Iterable[Member]) -> None:
        """The next epoch of a gang that runs, with these members; none has entered it yet."""
        if epoch <= self.epoch:
            raise ValueError(f"epochs only grow: {epoch} after {self.epoch}")
        self.epoch = epoch
        self.members = {member.rank: member for member in members}
        for rank, member in self.members.items():
            member.ready = member.progress = None
            self.joining.pop(rank, None)
        self.notify()

    def everybody(self) -> list[Member]:
        """Members, and who is to become one."""
        return [*self.members.values(), *self.joining.values()]

    def current(self, rank: int, incarnation: int) -> Member | None:
        """The member, unless this incarnation is no longer, or not yet, one."""
        for members in (self.members, self.joining):
            member = members.get(rank)
            if member is not None and member.incarnation == incarnation:
                return member
        return None

    def record_loss(self, rank: int, incarnation: int, loss: Loss) -> None:
        """The first word on why a rank went is kept, but what the rank said itself outweighs a mere silence."""
        member = self.current(rank, incarnation)
        if member is None or (member.loss is not None and (member.loss.is_told or not loss.is_told)):
            return
        member.loss, member.lost_at = loss, self.version
        self.notify()

    def losses(self) -> list[tuple[Member, Loss]]:
        """Who was lost and why, the earliest first."""
        lost = [(member, member.loss) for member in self.members.values() if member.loss is not None]
        return sorted(lost, key=lambda found: found[0].lost_at)

    def lacking(self, has: Callable[[Member], bool]) -> list[int]:
        """Ranks of which `has` is not true yet."""
        return [rank for rank, member in sorted(self.members.items()) if not has(member)]

    def named(self, ranks: list[int]) -> str:
        """Ranks as a person calls them, with their hosts where those have names."""
        by_host: dict[str, list[int]] = {}
        for rank in ranks:
            by_host.setdefault(self.members[rank].host, []).append(rank)
        if len({member.host for member in self.members.values()}) < 2:
            return f"rank {', '.join(map(str, ranks))}"
        return ", ".join(f"rank {', '.join(map(str, found))} on host {host}" for host, found in by_host.items())

    def enter(self, stage: str) -> None:
        """A stage of the start begins."""
        self.stage, self.detail = stage, ""
        self.notify()

    def settle(self, state: str, detail: str = "", is_user_error: bool = False) -> None:
        """The gang's own state, and why."""
        self.state, self.detail, self.is_user_error = state, detail, is_user_error
        ready = [member.ready for member in self.members.values() if member.ready is not None]
        if state == READY and ready:
            self._max_model_len, self._dtype = min(report.max_model_len for report in ready), ready[0].dtype
            for member in self.members.values():
                member.has_served = True
        self.notify()

    def notify(self) -> None:
        self.version += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def changed_since(self, version: int, timeout_s: float) -> int:
        """The version now: at once if it is another than `version`, else after the next change or `timeout_s`."""
        if self.version == version:
            # Not wait_for: of a change and a cancellation in the same moment it forgets the cancellation (Python 3.11).
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
        return self.version

    def view(self) -> gang_pb2.GangView:
        """The gang as it is now. `max_model_len` is the least that any rank can hold."""
        is_ready = self.state == READY
        everybody = sorted(self.everybody(), key=lambda member: (member.rank, member.incarnation))
        return gang_pb2.GangView(
            gang_id=self.gang_id,
            epoch=self.epoch,
            state=self.state,
            detail=self.detail,
            ranks=[member.view() for member in everybody],
            max_model_len=self._max_model_len if is_ready else 0,
            dtype=self._dtype if is_ready else "",
            is_user_error=self.is_user_error,
            stage=self.stage if self.state == STARTING else "",
            hosts=self.host_views(),
        )
