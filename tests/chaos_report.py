"""What a run of chaos saw, and which goals it met."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from cluster.bench_summary import percentile
from tests.chaos_schedule import Kind
from tests.chaos_streams import Told
from tests.chaos_victims import Struck

SETTLED_S = 0.5
"""After all is back: what still belongs to the event."""


@dataclass(frozen=True)
class Bound:
    """Most that an event of one kind may cost, in seconds."""

    gap_s: float
    """Between two messages of a stream beyond the undisturbed p99."""
    moved_gap_s: float
    """Between two messages of a stream whose rank was lost."""
    back_s: float
    """Until all is back."""

    def times(self, factor: float) -> "Bound":
        return Bound(self.gap_s * factor, self.moved_gap_s * factor, self.back_s * factor)


GOALS = {
    Kind.RANK: Bound(gap_s=0.3, moved_gap_s=1.0, back_s=20.0),
    Kind.TWO_RANKS: Bound(gap_s=0.3, moved_gap_s=1.0, back_s=20.0),
    Kind.STUCK: Bound(gap_s=4.0, moved_gap_s=4.0, back_s=25.0),
    Kind.ROUTER: Bound(gap_s=1.0, moved_gap_s=1.0, back_s=20.0),
    Kind.LEADER: Bound(gap_s=30.0, moved_gap_s=30.0, back_s=30.0),
}


@dataclass(frozen=True)
class Cost:
    """Of one event, in seconds."""

    struck: Struck
    gap_s: float
    """Worst of streams that kept their rank; nan: there were none."""
    gap_begins_s: float
    """After the event; before it where negative."""
    moved_gap_s: float
    """Worst of streams that lost their rank; nan: there were none."""
    moved: int
    """Streams that lost their rank."""
    back_s: float
    """nan: never."""


@dataclass
class Seen:
    """A whole run; times by time.monotonic."""

    seed: int
    started_at: float
    seconds: float
    calm_p99_s: float
    """Gap between messages before the first event."""
    told: list[Told]
    reference: dict[int, Told]
    """By the number of the request."""
    struck: list[Struck]
    left: dict[str, float] = field(default_factory=dict)
    """Series that should be 0 after the load and are not."""
    processes: list[str] = field(default_factory=list)
    """That were left after the server's end."""
    wrong: dict[str, str] = field(default_factory=dict)
    """The first difference from the undisturbed output by the id of the stream."""
    trouble: list[str] = field(default_factory=list)
    """What else went wrong."""

    @property
    def failed(self) -> list[Told]:
        return [told for told in self.told if told.failure]

    def compare(self) -> None:
        """Fill `wrong`."""
        for told in self.told:
            if not told.failure and (difference := told.difference(self.reference[told.asked.number])):
                self.wrong[told.request_id] = difference

    def costs(self) -> list[Cost]:
        return [self._cost(struck) for struck in self.struck]

    def during(self, struck: Struck) -> list[Told]:
        """Streams under way in an event."""
        end = self._end(struck)
        return [told for told in self.told if told.sent_at < end and told.ended_at > struck.at]

    def _end(self, struck: Struck) -> float:
        return (struck.whole_at or self.started_at + self.seconds) + SETTLED_S

    def _cost(self, struck: Struck) -> Cost:
        end = self._end(struck)
        # A gap that an earlier event began is that one's.
        begin = max((self._end(other) for other in self.struck if other.at < struck.at), default=0.0)
        kept, moved, moved_names = [(math.nan, 0.0)], [math.nan], set()
        for told in self.during(struck):
            gaps = [
                (after - before, before) for before, after in told.gaps() if after > struck.at and begin < before < end
            ]
            if told.request_id in struck.moved:
                moved_names.add(told.request_id)
                moved += [gap for gap, _ in gaps]
            else:
                kept += gaps
        worst = max(kept, key=lambda gap: (not math.isnan(gap[0]), gap[0]))
        return Cost(
            struck,
            gap_s=worst[0],
            gap_begins_s=worst[1] - struck.at if worst[1] else math.nan,
            moved_gap_s=max((gap for gap in moved if not math.isnan(gap)), default=math.nan),
            moved=len(moved_names),
            back_s=struck.whole_at - struck.at if struck.whole_at else math.nan,
        )


def judge(seen: Seen, factor: float = 1.0) -> list[str]:
    """A sentence for each goal that was missed.

    Args:
        factor: by which bounds of time are wider.
    """
    missed = [f"stream {told.request_id} failed: {told.failure}" for told in seen.failed]
    missed += [f"another output: {found}" for found in seen.wrong.values()]
    missed += seen.trouble
    missed += [f"{name} = {value:g} when idle" for name, value in seen.left.items()]
    missed += [f"process left at the end: {name}" for name in seen.processes]
    for number, cost in enumerate(seen.costs()):
        bound, what = GOALS[cost.struck.event.kind].times(factor), f"event {number}, {cost.struck.event}"
        most = seen.calm_p99_s + bound.gap_s
        if cost.gap_s > most:
            missed.append(f"{what}: a gap of {cost.gap_s:.3f} s, {cost.gap_begins_s:.1f} s after; at most {most:.3f} s")
        if cost.moved_gap_s > bound.moved_gap_s:
            missed.append(
                f"{what}: a gap of {cost.moved_gap_s:.3f} s of a stream that lost its rank; "
                f"at most {bound.moved_gap_s:g} s"
            )
        if not cost.back_s <= bound.back_s:
            missed.append(f"{what}: all was back after {cost.back_s:.1f} s; at most {bound.back_s:g} s")
    return missed


def tabulate(seen: Seen, factor: float = 1.0) -> Table:
    """A line a kind of event."""
    sent = len(seen.told)
    title = (
        f"{sent} streams in {seen.seconds / 60:.1f} minutes, {len(seen.failed)} failed, {len(seen.wrong)} with another "
        f"output; {len(seen.struck)} events, seed {seen.seed}; undisturbed gap p99 {seen.calm_p99_s * 1e3:.0f} ms"
    )
    table = Table(title=title, title_justify="left")
    for column in ("", "events", "gap of others, ms", "streams moved", "gap of moved, ms", "back after, s"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_column("failed", justify="right")
    table.add_column("wrong", justify="right")
    costs, wrong = seen.costs(), seen.wrong
    for kind in Kind:
        mine = [cost for cost in costs if cost.struck.event.kind is kind]
        if not mine:
            continue
        bound = GOALS[kind].times(factor)
        during = [told for cost in mine for told in seen.during(cost.struck)]
        table.add_row(
            kind,
            str(len(mine)),
            _spread([cost.gap_s for cost in mine], seen.calm_p99_s + bound.gap_s, _milliseconds),
            str(sum(cost.moved for cost in mine)),
            _spread([cost.moved_gap_s for cost in mine], bound.moved_gap_s, _milliseconds),
            _spread([cost.back_s for cost in mine], bound.back_s, lambda seconds: f"{seconds:.1f}"),
            str(len({told.request_id for told in during if told.failure})),
            str(len({told.request_id for told in during if told.request_id in wrong})),
        )
    table.caption = "median / most (bound); failed and wrong: streams that were under way"
    return table


def as_json(seen: Seen, factor: float = 1.0) -> dict[str, Any]:
    """All of it; seconds, from the start of the run."""
    return {
        "seed": seen.seed,
        "seconds": seen.seconds,
        "streams": len(seen.told),
        "tokens": sum(len(told.token_ids) for told in seen.told),
        "calm_gap_p99_s": seen.calm_p99_s,
        "bounds": {kind: asdict(bound.times(factor)) for kind, bound in GOALS.items()},
        "failed": {told.request_id: told.failure for told in seen.failed},
        "wrong": seen.wrong,
        "left_when_idle": seen.left,
        "processes_left": seen.processes,
        "events": [
            {
                "kind": cost.struck.event.kind,
                "victims": cost.struck.event.victims,
                "at_s": cost.struck.at - seen.started_at,
                "noticed_after_s": _number(cost.struck.noticed_at - cost.struck.at if cost.struck.noticed_at else None),
                "back_after_s": _number(cost.back_s),
                "gap_s": _number(cost.gap_s),
                "gap_begins_after_s": _number(cost.gap_begins_s),
                "moved": cost.moved,
                "moved_gap_s": _number(cost.moved_gap_s),
                "log": cost.struck.log,
            }
            for cost in seen.costs()
        ],
        "missed": judge(seen, factor),
    }


def calm_p99(told: Sequence[Told]) -> float:
    """Of the gaps of undisturbed streams, seconds."""
    return percentile([after - before for each in told for before, after in each.gaps()], 0.99)


def _spread(values: Sequence[float], bound: float, written: Callable[[float], str]) -> str:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "–"
    style = "red" if max(known) > bound else "default"
    return f"{written(statistics.median(known))} / [{style}]{written(max(known))}[/] ({written(bound)})"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}"


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 4)
