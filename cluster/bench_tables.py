"""What `caravan bench` prints: numbers, ratios, failures, and where the step goes."""

import math
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from cluster.bench_rounds import Plan, Result, Server
from cluster.bench_steps import UNEXPLAINED, part_names
from cluster.bench_summary import Quantiles, Ratios, Summary, median, ratios


def show(console: Console, plan: Plan, servers: Sequence[Server], results: Sequence[Result]) -> None:
    """All tables."""
    letters = [letter(number) for number in range(len(servers))]
    for server, name in zip(servers, letters, strict=True):
        console.print(f"{name}  {server.target.address}, model {server.facts.model}", markup=False)
    shape = plan.shape
    console.print(
        f"{shape.prompt_tokens} prompt and {shape.output_tokens} output tokens, mix {shape.mix.name}, greedy; "
        f"medians of {plan.rounds} round{'s' if plan.rounds != 1 else ''}, seed {plan.seed}",
        markup=False,
    )
    console.print(numbers_table(servers, results))
    if any(one.long for result in results for one in result.rounds):
        console.print(long_table(results))
    for sentence in failures(servers, results):
        console.print(sentence, markup=False, soft_wrap=True)
    for result in results:
        if part_names(result.all_steps):
            console.print(steps_table(result))


def numbers_table(servers: Sequence[Server], results: Sequence[Result]) -> Table:
    """A row a load and server, and under each peer's row how the benched server compares with it."""
    table = Table("load", "", "tok/s", "least–most", "first token", "gap", "end to end", "failed")
    for column in table.columns[2:]:
        column.justify = "right"
    table.caption = (
        "times: p50 / p99 in ms, of fewer than 100 requests the largest; a gap is between two messages of a stream"
    )
    for place, group in enumerate(by_load(results)):
        if place:
            table.add_section()
        ours = median(group[0].rounds)
        for result in group:
            summary = median(result.rounds)
            rates = [one.output_tokens_per_s for one in result.rounds]
            name = result.load.name if result is group[0] else ""
            table.add_row(
                name,
                letter(result.server),
                f"{summary.output_tokens_per_s:.0f}",
                f"{min(rates):.0f}–{max(rates):.0f}",
                *(_times(one) for one in (summary.first_token, summary.gap, summary.end_to_end)),
                f"{summary.failed} of {summary.requests}",
                style="" if summary.failed == 0 else "red",
            )
            if result.server:
                table.add_row("", f"A/{letter(result.server)}", *_ratio_cells(ratios(ours, summary)), style="bold")
    return table


def long_table(results: Sequence[Result]) -> Table:
    """How long prompts disturb running streams."""
    table = Table("load", "", "long prompts", "their first token", "calm gap", "gap beside them", "p99 / calm p50")
    table.title = "while long prompts arrive"
    table.caption = "times: p50 / p99 in ms"
    for column in table.columns[2:]:
        column.justify = "right"
    for group in by_load(results):
        for result in group:
            if (long := median(result.rounds).long) is None:
                continue
            cells = (str(long.count), _times(long.first_token), _times(long.calm_gap), _times(long.gap))
            table.add_row(result.load.name, letter(result.server), *cells, _times_as_much(long.stretch))
    return table


def steps_table(result: Result) -> Table:
    """Of one load on one server, rank by rank: shares of the wall time of its steps."""
    steps = result.all_steps
    ranks = sorted(steps, key=lambda rank: (rank[0], int(rank[1]) if rank[1].isdecimal() else 0))
    several_gangs = len({gang for gang, _ in ranks}) > 1
    table = Table("part", "ms a step", *(f"{gang} {rank}" if several_gangs else f"rank {rank}" for gang, rank in ranks))
    table.title = f"where the step goes: {result.load.name}, server {letter(result.server)}"
    for column in table.columns[1:]:
        column.justify = "right"
    count = sum(steps[rank].steps for rank in ranks)
    for part in part_names(steps):
        milliseconds = sum(steps[rank].parts.get(part, 0.0) for rank in ranks) / count * 1e3
        shares = (f"{steps[rank].share(part):.1%}" for rank in ranks)
        table.add_row(part, f"{milliseconds:.3f}", *shares, style="dim" if part == UNEXPLAINED else "")
    table.add_section()
    wall = sum(steps[rank].seconds for rank in ranks) / count * 1e3
    table.add_row("explained", "", *(f"{steps[rank].explained:.1%}" for rank in ranks), style="bold")
    table.add_row("wall", f"{wall:.3f}", *(f"{steps[rank].seconds:.2f} s" for rank in ranks))
    table.add_row("steps", "", *(f"{steps[rank].steps:.0f}" for rank in ranks))
    table.add_row("tokens a step", "", *(f"{steps[rank].tokens / steps[rank].steps:.1f}" for rank in ranks))
    return table


def failures(servers: Sequence[Server], results: Sequence[Result]) -> Iterator[str]:
    """A sentence a load, server and status."""
    for result in results:
        summary = median(result.rounds)
        for error, count in summary.errors.items():
            where = f"{result.load.name}, {servers[result.server].target.address}"
            yield f"{where}: {count} of {summary.requests} failed with {error}: {summary.details[error]}"


def by_load(results: Sequence[Result]) -> list[list[Result]]:
    """Results of each load, in the servers' order."""
    loads = dict.fromkeys(result.load for result in results)
    return [[result for result in results if result.load == load] for load in loads]


def letter(server: int) -> str:
    """A for the benched server, B, C, … for its peers."""
    return chr(ord("A") + server)


def _ratio_cells(one: Ratios) -> Iterator[str]:
    yield _times_as_much(one.output_tokens_per_s)
    yield ""
    for name in ("first_token", "gap", "end_to_end"):
        p50, p99 = (getattr(one, f"{name}_{quantile}") for quantile in ("p50", "p99"))
        yield f"{_times_as_much(p50)} / {_times_as_much(p99)}"
    yield ""


def _times_as_much(ratio: float) -> str:
    return "–" if math.isnan(ratio) else f"{ratio:.2f}×"


def _times(quantiles: Quantiles) -> str:
    return f"{_milliseconds(quantiles.p50)} / {_milliseconds(quantiles.p99)}"


def _milliseconds(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def failed_in_all(results: Sequence[Result]) -> tuple[int, int]:
    """Streams that failed, and streams."""
    summaries: list[Summary] = [one for result in results for one in result.rounds]
    return sum(one.failed for one in summaries), sum(one.requests for one in summaries)
