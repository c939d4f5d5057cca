"""What happens to a server under chaos, and when: drawn from a seed."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Of an event."""

    RANK = "rank killed"
    TWO_RANKS = "two ranks killed"
    STUCK = "rank stopped"
    """By SIGSTOP, and never continued."""
    ROUTER = "router killed"
    LEADER = "leader killed"


LONG_DECK = (Kind.RANK,) * 5 + (Kind.TWO_RANKS,) * 2 + (Kind.STUCK, Kind.ROUTER, Kind.LEADER)
SHORT_DECK = (Kind.RANK, Kind.TWO_RANKS, Kind.ROUTER)
PAUSE_S = (0.5, 3.0)
"""From the gang's being whole again until the next event: least and most."""


@dataclass(frozen=True)
class Event:
    """One of them."""

    kind: Kind
    victims: tuple[int, ...]
    """Ranks, or a router by its place among the routers."""
    pause_s: float
    """Before it, with the gang whole."""

    def __str__(self) -> str:
        named = ", ".join(map(str, self.victims))
        return f"{self.kind} ({named})" if named else str(self.kind)


def draw(seed: int, ranks: int, routers: int, deck: Sequence[Kind] = LONG_DECK) -> Iterator[Event]:
    """Events without end: the deck, shuffled, and again. The same for the same arguments."""
    random_ = random.Random(seed)
    while True:
        for kind in random_.sample(deck, len(deck)):
            victims = {
                Kind.RANK: (ranks, 1),
                Kind.TWO_RANKS: (ranks, 2),
                Kind.STUCK: (ranks, 1),
                Kind.ROUTER: (routers, 1),
                Kind.LEADER: (0, 0),
            }[kind]
            chosen = tuple(sorted(random_.sample(range(victims[0]), victims[1])))
            yield Event(kind, chosen, random_.uniform(*PAUSE_S))
