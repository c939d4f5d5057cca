"""That a soak would notice."""

import pytest

from cluster.bench_stream import Stream
from tests.soak import LONG, Soaked, fit, gap_windows, growth, judge


def streams(gap_at) -> list[Stream]:
    """One a second for ten minutes, ten messages each."""
    found = []
    for second in range(600):
        stream = Stream(float(second))
        stream.arrivals = [second + gap_at(second) * number for number in range(10)]
        stream.close(stream.arrivals[-1], 10, 10)
        found.append(stream)
    return found


def noise(second: int) -> float:
    return ((second * 7919) % 101 - 50) / 50


def soaked(*, gap_at=lambda second: 0.03, memory=None, **others) -> Soaked:
    ran = streams(gap_at)
    return Soaked(600.0, ran, {"rank 0": memory or [10**9] * 100}, gap_windows(ran, 0.0, 600.0), **others)


@pytest.mark.parametrize(
    "fine",
    [
        {},
        {"memory": [10**9 + 5 * 10**6 * (number % 3) for number in range(100)]},
        {"memory": [10**9 - 10**6 * number for number in range(100)]},
        {"gap_at": lambda second: 0.03 + 0.02 * noise(second)},
        {"gap_at": lambda second: 0.03 * (1 - second / 3000)},
        {"gap_at": lambda second: 0.03 * (1 + second / 20_000)},
    ],
)
def test_what_is_well(fine) -> None:
    assert judge(soaked(**fine), LONG)[1] == []


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"memory": [10**9 + 5 * 10**5 * number for number in range(100)]}, "memory of rank 0 (PSS)"),
        ({"memory": [10**9] * 50 + [0] * 50, "gone": ["rank 0"]}, "processes that ended: rank 0"),
        ({"gap_at": lambda second: 0.03 * (1 + second / 6000) + 0.0005 * noise(second)}, "gap p50 by window"),
        ({"left": {"caravan_kv_usage_ratio of rank 1": 0.25}}, "caravan_kv_usage_ratio of rank 1 = 0.25"),
    ],
)
def test_what_is_not(bad, says: str) -> None:
    (sentence,) = judge(soaked(**bad), LONG)[1]
    assert says in sentence


def test_failed_streams_and_no_gaps_are_missed_goals() -> None:
    failed = Stream(0.0)
    failed.fail(1.0, "UNAVAILABLE", "rank 1 died")
    missed = judge(Soaked(600.0, [failed], {}, []), LONG)[1]
    assert len(missed) == 2
    assert "UNAVAILABLE: rank 1 died" in missed[0]


def test_the_line_is_by_least_squares() -> None:
    line = fit([(0, 1.0), (1, 3.0), (2, 5.0), (3, 7.0)])
    assert (line.slope, line.mean, line.slope_error) == pytest.approx((2.0, 4.0, 0.0))
    # By hand: slope 0.6, residuals 0.2, -0.6, 0.6 … of x = 0…4.
    line = fit([(0, 2.0), (1, 1.0), (2, 4.0), (3, 3.0), (4, 4.0)])
    assert line.slope == pytest.approx(0.6)
    assert line.slope_error == pytest.approx((3.2 / 3 / 10) ** 0.5)


def test_growth_is_of_medians_so_that_one_sample_is_nothing() -> None:
    assert growth([100] * 20 + [900]) == 0
    assert growth([100] * 5 + [110] * 5) == pytest.approx(0.1)


def test_windows_are_whole_and_of_gaps_only() -> None:
    windows = gap_windows(streams(lambda second: 0.02), 0.0, 600.0)
    assert [middle for middle, _ in windows] == [10.0 * number + 5 for number in range(60)]
    assert {round(gap, 6) for _, gap in windows} == {20.0}
    assert len(gap_windows(streams(lambda second: 0.02), 0.0, 12.0)) == 6
