"""One request of `caravan bench` as the client saw it."""

from dataclasses import dataclass, field

SHORT = "short"
"""Error of a stream that ended well but with another number of tokens than was asked for."""
UNCOUNTED = "no usage"
"""Error of a stream whose end did not say how many tokens it had."""
TIMED_OUT = "timeout"
"""Error of a stream that was not whole within STREAM_BOUND_S."""
BROKEN = "broken connection"
"""Error of a stream whose connection could not be made or ended early."""
STREAM_BOUND_S = 600.0
"""Seconds a stream may take, from its request to its end."""


@dataclass(slots=True)
class Stream:
    """Times are time.perf_counter()'s, so that those of one process compare.

    One message may carry several tokens, and a stream's tokens are counted by its usage alone.
    """

    sent: float
    """When the request went out."""
    arrivals: list[float] = field(default_factory=list)
    """When each message with tokens came."""
    ended: float = 0.0
    """When the last message came, or the failure."""
    output_tokens: int = 0
    """As the server's usage says."""
    error: str = ""
    """What the failure is counted under, such as "RESOURCE_EXHAUSTED", "HTTP 429" or SHORT; empty: none."""
    detail: str = ""
    """The failure in a sentence."""

    @property
    def failed(self) -> bool:
        return bool(self.error)

    @property
    def first_token_s(self) -> float:
        """Seconds from the request to its first message with tokens; a stream that did not fail has one."""
        return self.arrivals[0] - self.sent

    @property
    def seconds(self) -> float:
        """From the request to its end."""
        return self.ended - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds from each message to the next."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]

    def fail(self, now: float, error: str, detail: str) -> None:
        """It ended at `now` without being what was asked for."""
        self.ended, self.error, self.detail = now, error, detail

    def close(self, now: float, counted: int | None, wanted: int) -> None:
        """It ended well, with `counted` tokens by its usage (None: it had none) of `wanted`."""
        self.ended = now
        if counted is None:
            self.fail(now, UNCOUNTED, "the stream ended without a usage")
        elif counted != wanted or not self.arrivals:
            self.fail(now, SHORT, f"the stream ended with {counted} of {wanted} tokens")
        else:
            self.output_tokens = counted
