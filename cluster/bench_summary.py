"""Numbers of one load on one server, over its streams and over rounds."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

from cluster.bench_drive import Drive
from cluster.bench_stream import Stream

SHARES = (0.5, 0.99)


@dataclass(frozen=True)
class Quantiles:
    """Milliseconds; NaN where there is nothing to measure."""

    p50: float
    p99: float


@dataclass(frozen=True)
class LongPrompts:
    """What long prompts do to running streams."""

    count: int
    first_token: Quantiles
    calm_gap: Quantiles
    """Between messages of streams just before, when no long prompt came."""
    gap: Quantiles
    """Between messages of streams that ran while a long prompt waited for its first token."""

    @property
    def stretch(self) -> float:
        """The p99 of gaps beside long prompts, as a multiple of the calm p50."""
        return self.gap.p99 / self.calm_gap.p50


@dataclass(frozen=True)
class Summary:
    """One load on one server in one round; failed streams count in `requests`, `failed` and `errors` alone."""

    seconds: float
    requests: int
    output_tokens: int
    messages: int
    output_tokens_per_s: float
    first_token: Quantiles
    gap: Quantiles
    """Between messages: one may carry several tokens."""
    end_to_end: Quantiles
    errors: dict[str, int] = field(default_factory=dict)
    """How many streams failed, by status."""
    details: dict[str, str] = field(default_factory=dict)
    """Of each status, the sentence of the first that failed so."""
    long: LongPrompts | None = None

    @property
    def failed(self) -> int:
        return sum(self.errors.values())


def percentile(values: Iterable[float], share: float) -> float:
    """The least value that `share` of all values do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def summarise(drive: Drive) -> Summary:
    """Everything about one load."""
    everyone = [*drive.streams, *drive.long, *drive.calm]
    failed = [stream for stream in everyone if stream.failed]
    well = [stream for stream in drive.streams if not stream.failed]
    output_tokens = sum(stream.output_tokens for stream in well)
    return Summary(
        seconds=drive.seconds,
        requests=len(everyone),
        output_tokens=output_tokens,
        messages=sum(len(stream.arrivals) for stream in well),
        output_tokens_per_s=output_tokens / drive.seconds if drive.seconds else 0.0,
        first_token=_quantiles(stream.first_token_s for stream in well),
        gap=_quantiles(gap for stream in well for gap in stream.gaps),
        end_to_end=_quantiles(stream.seconds for stream in well),
        errors=dict(Counter(stream.error for stream in failed)),
        details={stream.error: stream.detail for stream in reversed(failed)},
        long=_long(drive, well) if drive.long else None,
    )


def median(rounds: Sequence[Summary]) -> Summary:
    """Each rate's and time's median over rounds; counts (requests, tokens, messages, errors) are of all rounds."""
    errors: Counter[str] = Counter()
    details: dict[str, str] = {}
    for one in rounds:
        errors.update(one.errors)
        details = {**one.details, **details}
    long = [one.long for one in rounds if one.long is not None]
    return Summary(
        seconds=statistics.median(one.seconds for one in rounds),
        requests=sum(one.requests for one in rounds),
        output_tokens=sum(one.output_tokens for one in rounds),
        messages=sum(one.messages for one in rounds),
        output_tokens_per_s=statistics.median(one.output_tokens_per_s for one in rounds),
        first_token=_median([one.first_token for one in rounds]),
        gap=_median([one.gap for one in rounds]),
        end_to_end=_median([one.end_to_end for one in rounds]),
        errors=dict(errors),
        details=details,
        long=LongPrompts(
            count=sum(one.count for one in long),
            first_token=_median([one.first_token for one in long]),
            calm_gap=_median([one.calm_gap for one in long]),
            gap=_median([one.gap for one in long]),
        )
        if long
        else None,
    )


@dataclass(frozen=True)
class Ratios:
    """One server's medians over another's: of the throughput more is better, of all else less."""

    output_tokens_per_s: float
    first_token_p50: float
    first_token_p99: float
    gap_p50: float
    gap_p99: float
    end_to_end_p50: float
    end_to_end_p99: float


def ratios(ours: Summary, theirs: Summary) -> Ratios:
    """NaN where either has no number."""
    values = {"output_tokens_per_s": _over(ours.output_tokens_per_s, theirs.output_tokens_per_s)}
    for one in fields(Ratios)[1:]:
        name, _, quantile = one.name.rpartition("_")
        values[one.name] = _over(getattr(getattr(ours, name), quantile), getattr(getattr(theirs, name), quantile))
    return Ratios(**values)


def _over(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else math.nan


def _long(drive: Drive, well: Sequence[Stream]) -> LongPrompts:
    long = [stream for stream in drive.long if not stream.failed]
    windows = [(stream.sent, stream.arrivals[0]) for stream in long]
    beside = [
        after - before
        for stream in well
        for before, after in zip(stream.arrivals, stream.arrivals[1:], strict=False)
        if any(before < end and start < after for start, end in windows)
    ]
    return LongPrompts(
        count=len(long),
        first_token=_quantiles(stream.first_token_s for stream in long),
        calm_gap=_quantiles(gap for stream in drive.calm if not stream.failed for gap in stream.gaps),
        gap=_quantiles(beside),
    )


def _quantiles(seconds: Iterable[float]) -> Quantiles:
    values = [value * 1e3 for value in seconds]
    return Quantiles(*(percentile(values, share) for share in SHARES))


def _median(quantiles: Sequence[Quantiles]) -> Quantiles:
    """Of rounds without a number nothing is said."""

    def of(values: Iterable[float]) -> float:
        there = [value for value in values if not math.isnan(value)]
        return statistics.median(there) if there else math.nan

    return Quantiles(of(one.p50 for one in quantiles), of(one.p99 for one in quantiles))
