"""What `caravan bench` sends: how many requests, when, and what is in them. Plain data, drawn from a seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.bench_target import LEAST_TOKEN
from cluster.errors import UsageError

WARM_UP_REQUESTS = 4
# Long prompts that arrive while a measurement of that mix runs, one after the other.
LONG_PROMPTS = 6
DEFAULT_LONG_TOKENS = 8192
MIXES = ("random", "shared-prefix", "long-prompt")


@dataclass(frozen=True)
class Load:
    """One point of a bench: a closed load, where each stream is followed by the next, or an open one, where requests
    arrive whatever became of those before."""

    streams: int | None = None
    """Closed: streams at once."""
    rate: float | None = None
    """Open: arrivals a second, Poisson."""
    seconds: float | None = None
    """Requests are begun for so long; None, closed only: until `requests` have been."""

    @property
    def requests(self) -> int:
        """Of a closed load without a duration: 6 for one stream, 24 for 8, 128 for 64."""
        streams = self.streams or 1
        return max(6, min(24, 3 * streams), 2 * streams)

    @property
    def name(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g}/s"
        return f"{self.streams} stream{'s' if self.streams != 1 else ''}"


@dataclass(frozen=True)
class Mix:
    """What prompts are like."""

    kind: str = "random"
    """random: every prompt fresh. shared-prefix: fresh but for a beginning that all of one measurement share.
    long-prompt: fresh, and meanwhile long ones arrive."""
    tokens: int = 0
    """Of the shared prefix, or of a long prompt."""

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.tokens}" if self.tokens else self.kind


def parse_mix(text: str, prompt_tokens: int) -> Mix:
    """KIND or KIND:TOKENS. A shared prefix is half of the prompt unless given, a long prompt DEFAULT_LONG_TOKENS.

    Raises:
        UsageError: it is no mix, or does not go with `prompt_tokens`.
    """
    kind, _, number = text.partition(":")
    if kind not in MIXES or (number and (not number.isdecimal() or kind == "random" or int(number) == 0)):
        kinds = "random, shared-prefix, shared-prefix:TOKENS, long-prompt or long-prompt:TOKENS"
        raise UsageError(f"--mix: must be {kinds}, got {text!r}")
    if kind == "random":
        return Mix()
    if kind == "long-prompt":
        return Mix(kind, int(number or DEFAULT_LONG_TOKENS))
    tokens = int(number or max(1, prompt_tokens // 2))
    if tokens >= prompt_tokens:
        raise UsageError(f"--mix: a shared prefix of {tokens} tokens leaves nothing of a prompt of {prompt_tokens}")
    return Mix(kind, tokens)


@dataclass(frozen=True)
class Shape:
    """Every request of a bench."""

    mix: Mix
    prompt_tokens: int
    output_tokens: int

    @property
    def longest(self) -> int:
        """Tokens of prompt and output of the longest request."""
        longest = max(self.prompt_tokens, self.mix.tokens) if self.mix.kind == "long-prompt" else self.prompt_tokens
        return longest + self.output_tokens


class Prompts:
    """Token ids from LEAST_TOKEN to `tokens_end` - 1, each equally likely.

    Args:
        seed: the same one draws the same prompts in the same order.
    """

    def __init__(self, shape: Shape, tokens_end: int, seed: str) -> None:
        self._shape, self._range = shape, range(LEAST_TOKEN, tokens_end)
        self._rng = random.Random(seed)
        self._prefix = self._draw(shape.mix.tokens) if shape.mix.kind == "shared-prefix" else []

    def next(self) -> list[int]:
        """A prompt."""
        return self._prefix + self._draw(self._shape.prompt_tokens - len(self._prefix))

    def next_long(self) -> list[int]:
        """A long prompt of that mix."""
        return self._draw(self._shape.mix.tokens)

    def _draw(self, count: int) -> list[int]:
        return self._rng.choices(self._range, k=count)


def arrivals(rate: float, seconds: float, rng: random.Random) -> Iterator[float]:
    """Times of a Poisson process from 0 to `seconds`, `rate` a second."""
    at = rng.expovariate(rate)
    while at < seconds:
        yield at
        at += rng.expovariate(rate)
