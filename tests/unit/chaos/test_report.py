"""That a run of chaos would notice."""

import json
import math
from pathlib import Path

import pytest

from tests.chaos_plot import draw
from tests.chaos_report import GOALS, Seen, as_json, calm_p99, judge, tabulate
from tests.chaos_schedule import Event, Kind
from tests.chaos_streams import Asked, Told
from tests.chaos_victims import ELSEWHERE, Struck

START = 1000.0


def told(name: str, *, number: int = 0, start: float = START, pauses: dict[int, float] | None = None) -> Told:
    """A hundred tokens, 30 ms apart but for `pauses` before some."""
    stream = Told(Asked(number), name, sent_at=start)
    at = start
    for token in range(100):
        at += (pauses or {}).get(token, 0.03)
        stream.times.append(at)
        stream.counts.append(1)
        stream.token_ids.append(token + number)
    stream.ended_at = at
    stream.text = f"text {number}"
    return stream


def seen(*streams: Told, kind: Kind = Kind.RANK, back_s: float = 4.0, moved: set[str] | None = None, **others) -> Seen:
    """One event a second after the start, that is, before about the 33rd token."""
    whole_at = START + 1 + back_s if back_s else 0.0
    struck = Struck(Event(kind, (1,), 1.0), START + 1, START + 1.1, whole_at, moved or set())
    reference = {number: told("reference", number=number) for number in range(4)}
    run = Seen(1, START, 20.0, 0.03, list(streams), reference, [struck], **others)
    run.compare()
    return run


def test_what_is_well() -> None:
    run = seen(told("a", pauses={33: 0.3}), told("b", number=1, pauses={33: 0.9}), moved={"b"})
    assert judge(run) == []
    (cost,) = run.costs()
    assert cost.gap_s == pytest.approx(0.3)
    assert cost.gap_begins_s == pytest.approx(-0.01, abs=1e-6)
    assert cost.moved_gap_s == pytest.approx(0.9)
    assert (cost.moved, cost.back_s) == (1, 4.0)


def failed(stream: Told) -> Told:
    stream.failure = "UNAVAILABLE: rank 1 died"
    return stream


def changed(stream: Told, **fields) -> Told:
    for name, value in fields.items():
        setattr(stream, name, value)
    return stream


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (seen(failed(told("a"))), "stream a failed: UNAVAILABLE: rank 1 died"),
        (seen(changed(told("a"), token_ids=[0, 2, *range(2, 100)])), "token 1 of 100 is 2, undisturbed it is 1 of 100"),
        (seen(changed(told("a"), token_ids=[*range(50), *range(51, 100)])), "token 50 of 99 is 51"),
        (seen(changed(told("a"), token_ids=[*range(50), *range(49, 100)])), "token 50 of 101 is 49"),
        (seen(changed(told("a"), token_ids=list(range(99)))), "token 99 of 99 is None, undisturbed it is 99"),
        (seen(changed(told("a"), text="another")), "the same tokens, another text"),
        (seen(told("a", pauses={33: 0.4})), "a gap of 0.400 s"),
        (seen(told("a", pauses={60: 0.4})), "a gap of 0.400 s, 0.8 s after"),
        (seen(told("a", pauses={33: 1.1}), moved={"a"}), "1.100 s of a stream that lost its rank; at most 1 s"),
        (seen(told("a"), back_s=21.0), "all was back after 21.0 s; at most 20 s"),
        (seen(told("a"), back_s=0.0), "all was back after nan s"),
        (seen(told("a"), left={"caravan_kv_usage_ratio of rank 1": 0.25}), "caravan_kv_usage_ratio of rank 1 = 0.25"),
        (seen(told("a"), processes=["17 ray::RankActor"]), "process left at the end: 17 ray::RankActor"),
        (seen(told("a"), trouble=["the server ended"]), "the server ended"),
    ],
)
def test_what_is_not(bad: Seen, says: str) -> None:
    (sentence,) = judge(bad)
    assert says in sentence


def test_only_gaps_around_the_event_count() -> None:
    before, after = told("a", pauses={5: 0.7}), told("b", start=START + 6, pauses={5: 0.7})
    assert judge(seen(before, after)) == []
    assert judge(seen(told("a", pauses={33: 0.4})), factor=5.0) == []


def test_bounds_are_by_kind() -> None:
    slow = {33: 3.0}
    assert len(judge(seen(told("a", pauses=slow), kind=Kind.RANK))) == 1
    assert judge(seen(told("a", pauses=slow), kind=Kind.STUCK)) == []
    assert set(GOALS) == set(Kind)


def test_what_is_written(tmp_path: Path) -> None:
    run = seen(told("a", pauses={33: 0.3}), failed(told("b", number=1)))
    written = json.loads(json.dumps(as_json(run)))
    (event,) = written["events"]
    assert (event["kind"], event["victims"], event["moved_gap_s"]) == ("rank killed", [1], None)
    assert written["failed"] == {"b": "UNAVAILABLE: rank 1 died"}
    assert len(written["missed"]) == 1
    table = tabulate(run)
    assert table.row_count == 1
    assert list(table.columns[-2].cells) == ["1"]
    draw(tmp_path / "chaos.png", run)
    assert (tmp_path / "chaos.png").stat().st_size > 10_000
    assert math.isclose(calm_p99([told("a")]), 0.03, rel_tol=1e-6)


def test_the_log_names_who_moved() -> None:
    line = (
        "rank 2 of gang-1 was lost (UNAVAILABLE: Socket closed): 2 streams have to go on elsewhere: chaos-1, chaos-2\n"
    )
    assert ELSEWHERE.findall(line + line) == ["chaos-1, chaos-2"] * 2
