"""The picture of tests/chaos.py: tokens a second, and below what each event cost."""

from collections import Counter
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cluster.bench_plot import COLOURS
from tests.chaos_report import GOALS, Seen
from tests.chaos_schedule import Kind

COLOUR_OF = dict(zip(Kind, COLOURS, strict=False))
WINDOW_S = 0.5


def draw(file: Path, seen: Seen) -> None:
    """Write the picture."""
    figure = Figure(figsize=(min(30.0, max(10.0, seen.seconds / 25)), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    rates, gaps = figure.subplots(2, 1, sharex=True)
    figure.suptitle(
        f"{len(seen.told)} streams, {len(seen.struck)} events, seed {seen.seed}: {len(seen.failed)} streams failed, "
        f"{len(seen.wrong)} with another output",
        fontsize=10,
    )
    windows: Counter[int] = Counter()
    for told in seen.told:
        for at, count in zip(told.times, told.counts, strict=True):
            windows[int((at - seen.started_at) / WINDOW_S)] += count
    numbers = range(int(seen.seconds / WINDOW_S))
    rates.plot(
        [(number + 0.5) * WINDOW_S for number in numbers], [windows[n] / WINDOW_S for n in numbers], color="#555"
    )
    rates.set_ylabel("output tokens a second")
    rates.set_ylim(bottom=0)
    met = set()
    for cost in seen.costs():
        kind, at = cost.struck.event.kind, cost.struck.at - seen.started_at
        colour = COLOUR_OF[kind]
        rates.axvline(at, color=colour, linewidth=1, label=None if kind in met else kind)
        gaps.axvline(at, color=colour, linewidth=0.5, alpha=0.4)
        if cost.back_s == cost.back_s:
            rates.axvspan(at, at + cost.back_s, color=colour, alpha=0.12, linewidth=0)
        bound = GOALS[kind]
        gaps.plot(at, max(cost.gap_s, 1e-3), "o", color=colour, markersize=5)
        gaps.plot(at, max(cost.moved_gap_s, 1e-3), "D", color=colour, markersize=5, markerfacecolor="white")
        gaps.plot(at, seen.calm_p99_s + bound.gap_s, "_", color=colour, markersize=9)
        met.add(kind)
    gaps.axhline(seen.calm_p99_s, color="#999", linestyle=":", linewidth=1)
    gaps.set_yscale("log")
    gaps.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    gaps.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    gaps.yaxis.set_minor_formatter(NullFormatter())
    gaps.set_ylabel("worst gap, s (● others, ◇ moved,\n– bound, ⋯ undisturbed p99)")
    gaps.set_xlabel("seconds; shaded until all was back")
    for panel in (rates, gaps):
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    if met:
        figure.legend(*rates.get_legend_handles_labels(), loc="outside lower center", ncols=len(met), frameon=False)
    figure.savefig(file, dpi=100, format="png")
