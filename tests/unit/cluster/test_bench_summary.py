"""The mathematics of a bench."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.bench_drive import Drive
from cluster.bench_stream import SHORT, UNCOUNTED, Stream
from cluster.bench_summary import median, percentile, ratios, summarise


def stream(sent: float, *arrivals: float, tokens: int = 0) -> Stream:
    """One that went well, a token a message unless `tokens` says more."""
    one = Stream(sent, list(arrivals))
    one.close(arrivals[-1], tokens or len(arrivals), tokens or len(arrivals))
    return one


def failed(error: str, detail: str = "") -> Stream:
    one = Stream(0.0, [0.1])
    one.fail(0.5, error, detail)
    return one


@given(st.lists(st.floats(0, 1000), min_size=1), st.floats(0.01, 1))
def test_percentile_is_the_least_value_that_so_many_do_not_exceed(values: list[float], share: float) -> None:
    result = percentile(values, share)
    assert result in values
    assert sum(value <= result for value in values) >= share * len(values) - 1e-6
    assert sum(value < result for value in values) < share * len(values)


def test_percentiles_of_known_values() -> None:
    hundred = list(range(1, 101))
    assert (percentile(hundred, 0.5), percentile(hundred, 0.99), percentile([3.0], 0.99)) == (50, 99, 3.0)
    assert math.isnan(percentile([], 0.5))


def test_a_stream_is_judged_by_its_usage_not_its_messages() -> None:
    several = stream(0.0, 1.0, 2.0, tokens=10)
    assert (several.output_tokens, several.failed, several.first_token_s, several.seconds) == (10, False, 1.0, 2.0)
    short, uncounted, empty = Stream(0.0, [1.0]), Stream(0.0, [1.0]), Stream(0.0)
    short.close(2.0, 9, 10)
    uncounted.close(2.0, None, 10)
    empty.close(2.0, 10, 10)
    assert [one.error for one in (short, uncounted, empty)] == [SHORT, UNCOUNTED, SHORT]
    assert "9 of 10" in short.detail


def test_summary_counts_tokens_times_and_errors() -> None:
    streams = [
        stream(0.0, 0.1, 0.2, 0.4, tokens=8),
        stream(1.0, 1.3, 1.4, tokens=4),
        failed("HTTP 429", "the queue is full"),
        failed("HTTP 429", "another"),
        failed(SHORT, "3 of 4"),
    ]
    summary = summarise(Drive(2.0, streams))
    assert (summary.requests, summary.failed, summary.output_tokens, summary.messages) == (5, 3, 12, 5)
    assert summary.output_tokens_per_s == 6.0
    assert summary.errors == {"HTTP 429": 2, SHORT: 1}
    assert summary.details == {"HTTP 429": "the queue is full", SHORT: "3 of 4"}
    assert (summary.first_token.p50, summary.first_token.p99) == pytest.approx((100, 300))
    assert (summary.gap.p50, summary.gap.p99) == pytest.approx((100, 200))
    assert (summary.end_to_end.p50, summary.end_to_end.p99) == pytest.approx((400, 400))


def test_a_load_that_failed_altogether_has_no_times() -> None:
    summary = summarise(Drive(1.0, [failed("UNAVAILABLE")]))
    assert summary.output_tokens_per_s == 0
    assert math.isnan(summary.gap.p50)
    assert math.isnan(ratios(summary, summary).gap_p50)
    assert math.isnan(ratios(summary, summary).output_tokens_per_s)
    assert median([summary, summarise(Drive(1.0, [stream(0.0, 1.0, 2.0)]))]).gap.p50 == 1000


def test_medians_over_rounds_and_no_error_is_lost() -> None:
    rounds = [
        summarise(Drive(1.0, [stream(0.0, first, first + gap, tokens=tokens), *failures]))
        for first, gap, tokens, failures in (
            (0.1, 0.5, 10, [failed("A", "one")]),
            (0.9, 0.1, 30, []),
            (0.2, 0.3, 20, [failed("A", "two"), failed("B", "three")]),
        )
    ]
    middle = median(rounds)
    assert middle.output_tokens_per_s == 20
    assert middle.first_token.p50 == pytest.approx(200)
    assert middle.gap.p99 == pytest.approx(300)
    assert middle.errors == {"A": 2, "B": 1}
    assert middle.details == {"A": "one", "B": "three"}
    assert (middle.requests, middle.failed) == (6, 3)
    assert median(rounds[:1]).output_tokens_per_s == rounds[0].output_tokens_per_s


def test_ratios_are_ours_over_theirs() -> None:
    ours = summarise(Drive(1.0, [stream(0.0, 0.1, 0.3, tokens=30)]))
    theirs = summarise(Drive(1.0, [stream(0.0, 0.2, 0.3, tokens=20)]))
    one = ratios(ours, theirs)
    assert one.output_tokens_per_s == pytest.approx(1.5)
    assert one.first_token_p50 == one.first_token_p99 == pytest.approx(0.5)
    assert one.gap_p50 == pytest.approx(2.0)
    assert one.end_to_end_p99 == pytest.approx(1.0)


def test_gaps_beside_long_prompts_are_those_that_one_waited_in() -> None:
    calm = [stream(0.0, *(0.1 * n for n in range(1, 11)))]
    # The long prompt waits from 20.0 to 21.0; gaps of 0.25 s touch that time, the later ones of 0.05 s do not.
    streams = [stream(19.0, 19.9, 20.15, 20.4, 20.65, 20.9, 21.15, 21.2, 21.25, 21.3)]
    summary = summarise(Drive(3.0, streams, long=[stream(20.0, 21.0), failed("HTTP 400", "too long")], calm=calm))
    assert summary.long is not None
    assert summary.long.count == 1
    assert summary.long.first_token.p50 == pytest.approx(1000)
    assert summary.long.calm_gap.p50 == pytest.approx(100)
    assert summary.long.gap.p50 == summary.long.gap.p99 == pytest.approx(250)
    assert summary.long.stretch == pytest.approx(2.5)
    assert summary.errors == {"HTTP 400": 1}
    assert summary.requests == 4
    assert median([summary, summary, summary]).long.count == 3
