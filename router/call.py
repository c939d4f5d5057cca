"""What a door knows of a call besides its request."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CallInfo:
    """One call, whichever door it came through."""

    deadline_s: float | None = None
    """Seconds that the transport leaves the call; None: no bound."""
    attempt: int = 0
    """How often the caller was refused before and comes back with this request."""
