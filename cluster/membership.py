"""What a leader knows of its gang: one record a rank, and the view of it all that routers and operators see."""

import asyncio
from collections.abc import Callable
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
    host: str = ""
    """As a person calls it; empty before it is known where the rank goes."""
    commands: asyncio.Queue[gang_pb2.LeaderCommand] = field(default_factory=asyncio.Queue)
    """What its lifeline is still to carry down."""

    @property
    def state(self) -> str:
        if self.loss is not None:
            return DEAD
        if self.ready is not None:
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
        self.host_views: Callable[[], list[gang_pb2.HostView]] = list
        """Of the gang's hosts, now."""
        self._changed = asyncio.Event()

    def begin(self, epoch: int, incarnations: dict[int, int]) -> None:
        """A new epoch with nobody joined yet: `incarnations` by rank."""
        if epoch <= self.epoch:
            raise ValueError(f"epochs only grow: {epoch} after {self.epoch}")
        self.epoch = epoch
        self.state, self.stage, self.detail = STARTING, "", ""
        self.members = {rank: Member(rank, incarnation) for rank, incarnation in incarnations.items()}
        self.notify()

    def current(self, rank: int, incarnation: int) -> Member | None:
        """The member, unless this incarnation is no longer, or not yet, one."""
        member = self.members.get(rank)
        return member if member is not None and member.incarnation == incarnation else None

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
        self.notify()

    def notify(self) -> None:
        self.version += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def changed_since(self, version: int, timeout_s: float) -> int:
        """The version now: at once if it is another than `version`, else after the next change or `timeout_s`."""
        if self.version == version:
            try:
                await asyncio.wait_for(self._changed.wait(), timeout_s)
            except TimeoutError:
                pass
        return self.version

    def view(self) -> gang_pb2.GangView:
        """The gang as it is now. `max_model_len` is the least that any rank can hold."""
        ready = [member.ready for member in self.members.values() if member.ready is not None]
        is_ready = self.state == READY
        return gang_pb2.GangView(
            gang_id=self.gang_id,
            epoch=self.epoch,
            state=self.state,
            detail=self.detail,
            ranks=[member.view() for _, member in sorted(self.members.items())],
            max_model_len=min(report.max_model_len for report in ready) if is_ready else 0,
            dtype=ready[0].dtype if is_ready else "",
            is_user_error=self.is_user_error,
            stage=self.stage if self.state == STARTING else "",
            hosts=self.host_views(),
        )
