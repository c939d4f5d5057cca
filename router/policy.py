"""Which rank gets a new sequence."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A rank that can take a sequence, and what it has to do already."""

    gang_id: str
    rank: int
    pending_tokens: int
    """Tokens it has yet to compute: as it said last, and what was sent to it since."""
    sequences: int
    """Sequences it runs or has waiting, counted the same way."""


def pick(candidates: Sequence[Candidate]) -> Candidate:
    """The rank that will be free first: fewest pending tokens, then fewest sequences, then the lowest number.

    Args:
        candidates: at least one.
    """
    return min(candidates, key=lambda c: (c.pending_tokens, c.sequences, c.gang_id, c.rank))
