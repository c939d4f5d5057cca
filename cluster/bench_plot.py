"""What --png draws: throughput, first token and gap over the loads, the servers side by side."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from cluster.bench_rounds import Plan, Result, Server
from cluster.bench_summary import Quantiles, Summary, median
from cluster.bench_tables import by_load, letter

# Okabe and Ito's, which the colour-blind tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
# More loads than these are a curve.
MOST_BARS = 4

Panel = tuple[str, str, Callable[[Summary], Quantiles]]
PANELS: tuple[Panel, ...] = (
    ("first token", "ms", lambda summary: summary.first_token),
    ("gap between messages", "ms", lambda summary: summary.gap),
)


def draw(file: Path, plan: Plan, servers: Sequence[Server], results: Sequence[Result], caption: str) -> None:
    """Write the picture.

    Args:
        caption: on what it was measured.
    """
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    shape = plan.shape
    what = f"{shape.prompt_tokens} prompt, {shape.output_tokens} output tokens, mix {shape.mix.name}"
    figure.suptitle(f"{what}; medians of {plan.rounds} round{'s' if plan.rounds != 1 else ''}\n{caption}", fontsize=9)
    axes: list[Axes] = list(figure.subplots(1, 1 + len(PANELS)))
    groups = by_load(results)
    medians = [[median(group[number].rounds) for group in groups] for number in range(len(servers))]
    names = [group[0].load.name for group in groups]
    is_curve = len(groups) > MOST_BARS
    sizes = [float(group[0].load.streams or group[0].load.rate or 0) for group in groups]
    for number, summaries in enumerate(medians):
        place = _Place(axes[0], number, len(servers), sizes if is_curve else None)
        rates = [[one.output_tokens_per_s for one in group[number].rounds] for group in groups]
        place.throughput(_label(servers, number), [one.output_tokens_per_s for one in summaries], rates)
        for axis, (_, _, pick) in zip(axes[1:], PANELS, strict=True):
            _Place(axis, number, len(servers), sizes if is_curve else None).times([pick(one) for one in summaries])
    axes[0].set_title("output tokens a second")
    for axis, (title, unit, _) in zip(axes[1:], PANELS, strict=True):
        axis.set_title(f"{title}, {unit} (● p50, ○ p99)")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    for axis in axes:
        _x_axis(axis, names, sizes if is_curve else None, "streams" if plan.loads[0].streams else "arrivals a second")
    axes[0].set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=len(servers), frameon=False)
    figure.savefig(file, dpi=110, format="png")


class _Place:
    """Where one server's marks stand in a panel: bars beside the others', or a curve over `sizes`."""

    def __init__(self, axis: Axes, number: int, servers: int, sizes: Sequence[float] | None) -> None:
        self._axis, self._colour = axis, COLOURS[number % len(COLOURS)]
        self._width = 0.8 / servers
        self._shift = (number - (servers - 1) / 2) * self._width
        self._sizes = sizes

    def throughput(self, label: str, values: Sequence[float], rounds: Sequence[Sequence[float]]) -> None:
        """With what the rounds spread over."""
        places = self._places(len(values))
        spread = [
            [value - min(all_) for value, all_ in zip(values, rounds, strict=True)],
            [max(all_) - value for value, all_ in zip(values, rounds, strict=True)],
        ]
        if self._sizes is not None:
            self._axis.errorbar(places, values, yerr=spread, color=self._colour, marker="o", capsize=3, label=label)
            return
        bars = self._axis.bar(places, values, self._width, yerr=spread, capsize=3, color=self._colour, label=label)
        self._axis.bar_label(bars, [f"{value:.0f}" for value in values], padding=2, fontsize=8)

    def times(self, quantiles: Sequence[Quantiles]) -> None:
        """A full mark for p50, an open one for p99."""
        places = self._places(len(quantiles))
        p50, p99 = [one.p50 for one in quantiles], [one.p99 for one in quantiles]
        line = "-" if self._sizes is not None else "none"
        if self._sizes is None:
            self._axis.vlines(places, p50, p99, color=self._colour, linewidth=2)
        self._axis.plot(places, p50, marker="o", linestyle=line, color=self._colour)
        self._axis.plot(
            places, p99, marker="o", markerfacecolor="white", linestyle=":" if line == "-" else line, color=self._colour
        )
        if self._sizes is None:
            for place, low, high in zip(places, p50, p99, strict=True):
                for value, side in ((low, "top"), (high, "bottom")):
                    if math.isfinite(value):
                        offset = (0, -6 if side == "top" else 6)
                        self._axis.annotate(
                            f"{value:.3g}",
                            (place, value),
                            offset,
                            textcoords="offset points",
                            ha="center",
                            va=side,
                            fontsize=8,
                        )

    def _places(self, count: int) -> list[float]:
        return list(self._sizes) if self._sizes is not None else [place + self._shift for place in range(count)]


def _x_axis(axis: Axes, names: Sequence[str], sizes: Sequence[float] | None, unit: str) -> None:
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    if sizes is None:
        axis.set_xticks(range(len(names)), names)
        axis.set_xlim(-0.6, len(names) - 0.4)
        return
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(unit)


def _label(servers: Sequence[Server], number: int) -> str:
    server = servers[number]
    return f"{letter(number)}: {server.facts.model} at {server.target.address}"
