"""Which rank gets a new sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

LOOKAHEAD = 16
"""One sequence in so many may wait at a rank."""


@dataclass(frozen=True)
class Candidate:
    """A rank that can take a sequence, and what it has to do already."""

    gang_id: str
    rank: int
    pending_tokens: int
    """Tokens it has yet to compute: as it said last, and what was sent to it since."""
    sequences: int
    """Sequences it runs or has waiting, counted the same way."""
    max_sequences: int = 0
    """Sequences it runs at once at most; 0: unknown."""
    free_kv_tokens: int | None = None
    """Tokens its KV memory has room for beside what it runs and what was sent to it since; None: unknown."""

    def has_room(self, prompt_tokens: int) -> bool:
        """Whether one more sequence would start soon, and not wait where its turn is not decided."""
        if not self.max_sequences or not self.sequences:
            return True
        # A few may wait there, so that the rank is never short of work while the router hears of a free place.
        ahead = max(1, self.max_sequences // LOOKAHEAD)
        fits = self.free_kv_tokens is None or prompt_tokens <= self.free_kv_tokens
        return fits and self.sequences < self.max_sequences + ahead


def pick(candidates: Sequence[Candidate], prompt_tokens: int = 0) -> Candidate | None:
    """The rank with room that will be free first: fewest pending tokens, then fewest sequences, then the lowest number.

    Args:
        candidates: at least one.
        prompt_tokens: tokens of the sequence to place.

    Returns:
        None when no rank has room.
    """
    candidates = [candidate for candidate in candidates if candidate.has_room(prompt_tokens)]
    if not candidates:
        return None
    return min(candidates, key=lambda c: (c.pending_tokens, c.sequences, c.gang_id, c.rank))
