"""What tests/growth.py measures: places on its axes. Plain data."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.bench_load import Load
from tests.growth_server import Checkpoint, ServerSpec

STREAMS = tuple(2**power for power in range(9))
PROMPT_TOKENS = tuple(2**power for power in range(7, 16))
EXPERTS = tuple(2**power for power in range(4, 10))
RANKS = (1, 2, 4, 8)
# Of the experts and ranks axes: how many streams each of their points is measured with.
AT_STREAMS = (1, 8, 64)
USUAL_PROMPT, USUAL_OUTPUT = 128, 64
# Of the prompt axis: few tokens of output, and so many seconds in which requests are begun.
PROMPT_OUTPUT, PROMPT_SECONDS = 8, 1.0
EXPERTS_MLP = 256
AXES = ("streams", "prompt", "experts", "ranks")
X_NAMES = {"streams": "streams", "prompt": "prompt tokens", "experts": "routed experts", "ranks": "ranks"}


@dataclass(frozen=True)
class Point:
    """One place on one curve."""

    axis: str
    x: int
    load: Load
    prompt_tokens: int
    output_tokens: int
    server: ServerSpec

    @property
    def curve(self) -> str:
        """Which of the axis' curves: those of experts and ranks have one for each number of streams."""
        return "" if self.axis in ("streams", "prompt") else self.load.name

    @property
    def name(self) -> str:
        unit = X_NAMES[self.axis] if self.x != 1 else X_NAMES[self.axis].removesuffix("s")
        return f"{self.x} {unit}" + (f", {self.curve}" if self.curve else "")


def make_points(axes: Sequence[str], ranks: int, most: dict[str, int] | None = None) -> list[Point]:
    """All points of these axes.

    Args:
        ranks: of every axis but that of ranks.
        most: the greatest value of an axis, where not all of it is wanted.
    """
    mini = ServerSpec(ranks, Checkpoint())
    usual = (USUAL_PROMPT, USUAL_OUTPUT)
    points = [Point("streams", x, Load(streams=x), *usual, mini) for x in STREAMS]
    one = Load(streams=1, seconds=PROMPT_SECONDS)
    points += [Point("prompt", x, one, x, PROMPT_OUTPUT, mini) for x in PROMPT_TOKENS]
    points += [
        Point("ranks", x, Load(streams=streams), *usual, ServerSpec(x, Checkpoint()))
        for x in RANKS
        for streams in AT_STREAMS
    ]
    points += [
        Point("experts", x, Load(streams=streams), *usual, ServerSpec(ranks, Checkpoint(x, EXPERTS_MLP)))
        for x in EXPERTS
        for streams in AT_STREAMS
    ]
    most = most or {}
    return [point for point in points if point.axis in axes and point.x <= most.get(point.axis, point.x)]


def short_points() -> list[Point]:
    """A few seconds' work on the model in the package: that all of it runs, not how fast anything is."""
    nano = ServerSpec(2, None)
    return [Point("streams", x, Load(streams=x), 16, 4, nano) for x in (1, 2, 4, 8)]
