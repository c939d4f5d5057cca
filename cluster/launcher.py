"""What a leader needs of whoever starts processes for it: room, ranks, certain ends. Knows no Ray."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.host import Host
from cluster.membership import Loss
from workers.config import RankConfig


@dataclass(frozen=True)
class Placed:
    """Room reserved for every rank."""

    host_of: Sequence[str]
    """By rank: its host's address, as `Host.ray_address`."""
    hosts: Sequence[Host] = field(default=())
    """Every host once; none where all ranks are on the leader's own and nothing need be asked."""


class Launcher(Protocol):
    """Starts and ends the processes of ranks."""

    async def place(self, num_ranks: int) -> Placed:
        """Reserve room for every rank; asked again, the room already reserved where all of it is still there.

        Raises:
            NoRoomError: no room.
            UserError: the cluster is set up in a way that cannot work.
        """

    async def launch(self, config: RankConfig) -> None:
        """Start one incarnation of one rank."""

    async def ended(self, rank: int, incarnation: int) -> Loss:
        """Returns once the process of this launched incarnation has ended, with the reason."""

    async def kill(self, rank: int, incarnation: int) -> None:
        """Returns once this incarnation is certain not to act any more, or its host is out of reach: what comes of it
        then is of an old epoch, which everybody drops. One that is gone already is fine."""

    def shun(self, address: str) -> None:
        """A host is out of reach: place nothing there for a while."""
