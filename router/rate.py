"""How fast tokens are served, measured."""

from collections.abc import Callable

WINDOW_S = 1.0
SMOOTHING = 0.3
"""Weight of the newest window."""


class RateMeter:
    """Tokens a second while there is work.

    What is asked is what the ranks *can* do. A window in which requests had to wait shows it; one with less work shows
    a lower bound.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._window_start = clock()
        self._busy_since: float | None = None
        self._busy_s = 0.0
        self._tokens = 0
        self._had_queue = False
        self._saturated_rate: float | None = None
        self._highest_rate: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """None: nothing measured yet."""
        return self._highest_rate if self._saturated_rate is None else self._saturated_rate

    def add(self, tokens: int, has_queue: bool) -> None:
        """`tokens` were served just now; `has_queue`: others wait."""
        self._tokens += tokens
        self._had_queue = self._had_queue or has_queue
        if self._clock() - self._window_start >= WINDOW_S:
            self._close_window()

    def set_busy(self, is_busy: bool) -> None:
        """Whether any request is at a rank, from now on."""
        now = self._clock()
        if is_busy and self._busy_since is None:
            self._busy_since = now
        elif not is_busy and self._busy_since is not None:
            self._busy_s += now - self._busy_since
            self._busy_since = None

    def _close_window(self) -> None:
        now = self._clock()
        if self._busy_since is not None:
            self._busy_s += now - self._busy_since
            self._busy_since = now
        if self._busy_s >= WINDOW_S / 4:
            rate = self._tokens / self._busy_s
            self._highest_rate = max(rate, self._highest_rate or 0.0)
            if self._had_queue:
                last = self._saturated_rate
                self._saturated_rate = rate if last is None else last + SMOOTHING * (rate - last)
        self._window_start, self._busy_s, self._tokens, self._had_queue = now, 0.0, 0, False


class UsedShare:
    """What part of the tokens a request could take it takes in the end. Old requests fade."""

    FADING = 0.995

    def __init__(self) -> None:
        # As if one request of 100 tokens had taken all it could: the first ones must not say too much.
        self._used = self._cost = 100.0

    @property
    def ratio(self) -> float:
        """In (0, 1]."""
        return max(0.01, self._used / self._cost)

    def add(self, used: int, cost: int) -> None:
        self._used = self._used * self.FADING + used
        self._cost = self._cost * self.FADING + cost
