"""The picture of tests/growth.py: a panel an axis, a curve for each number of streams."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from cluster.bench_plot import COLOURS
from tests.growth import Measured
from tests.growth_bend import Bend
from tests.growth_points import AXES, X_NAMES

TITLES = {
    "streams": "output tok/s by streams",
    "prompt": "prompt tok/s until the first token, by prompt length",
    "experts": "output tok/s by experts",
    "ranks": "output tok/s by ranks on this machine",
}
SECOND = "#777777"


def draw(file: Path, measured: Sequence[Measured], bends: Mapping[tuple[str, str], Bend], caption: str) -> None:
    """Write the picture, with a panel for each axis there is a point of.

    Args:
        caption: on what it was measured.
    """
    axes = [axis for axis in AXES if any(one.point.axis == axis for one in measured)]
    columns = min(2, len(axes))
    rows = -(-len(axes) // columns)
    figure = Figure(figsize=(6.6 * columns, 4.4 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    rounds = max(len(one.rounds) for one in measured)
    figure.suptitle(
        f"medians of {rounds} round{'s' if rounds != 1 else ''}, bars: least to most\n{caption}", fontsize=9
    )
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, axis in zip(panels, axes, strict=False):
        _panel(panel, axis, [one for one in measured if one.point.axis == axis], bends)
    for panel in panels[len(axes) :]:
        panel.set_visible(False)
    figure.savefig(file, dpi=110, format="png")


def _panel(panel: Axes, axis: str, measured: Sequence[Measured], bends: Mapping[tuple[str, str], Bend]) -> None:
    curves = dict.fromkeys(one.point.curve for one in measured)
    for number, curve in enumerate(curves):
        colour = COLOURS[number]
        points = sorted((one for one in measured if one.point.curve == curve), key=lambda one: one.point.x)
        xs, ys = [one.point.x for one in points], [one.rate for one in points]
        spread = [
            [one.rate - min(one.rates) for one in points],
            [max(one.rates) - one.rate for one in points],
        ]
        bend = bends.get((axis, curve))
        words = [curve] if curve else []
        if bend is not None:
            words.append(f"×{bend.before:.2f} a doubling to {bend.x:g}, then ×{bend.after:.2f}")
            panel.axvline(bend.x, color=colour, linestyle=":", linewidth=1)
            panel.plot(bend.x, bend.y, "o", markersize=11, markerfacecolor="none", markeredgecolor=colour)
        label = ": ".join(words) or None
        panel.errorbar(xs, ys, yerr=spread, color=colour, marker="o", markersize=4, capsize=3, label=label)
        for x, y in {(xs[0], ys[0]), (xs[-1], ys[-1]), max(zip(xs, ys, strict=True), key=lambda point: point[1])}:
            _note(panel, f"{y:.0f}", x, y, colour)
    xs = sorted({one.point.x for one in measured})
    panel.set_title(TITLES[axis], fontsize=11)
    panel.set_xscale("log", base=2)
    panel.set_xticks(xs, [f"{x:g}" for x in xs])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel(X_NAMES[axis])
    _logarithmic(panel)
    panel.margins(y=0.25)
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines["top"].set_visible(False)
    if axis in ("streams", "prompt"):
        _times(panel, axis, sorted(measured, key=lambda one: one.point.x))
    else:
        panel.spines["right"].set_visible(False)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize=8, framealpha=0.8, edgecolor="none", loc="upper left" if axis == "streams" else "best")


def _times(panel: Axes, axis: str, measured: Sequence[Measured]) -> None:
    """On a second scale: what a single stream sees."""
    times = panel.twinx()
    what = "gap p50, ms" if axis == "streams" else "first token p50, ms"
    values = [(one.median.gap if axis == "streams" else one.median.first_token).p50 for one in measured]
    times.plot([one.point.x for one in measured], values, color=SECOND, linestyle="--", marker=".", linewidth=1)
    times.set_ylabel(f"{what} (dashed)", color=SECOND)
    _logarithmic(times)
    times.spines["top"].set_visible(False)


def _logarithmic(panel: Axes) -> None:
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_locator(NullLocator())


def _note(panel: Axes, text: str, x: float, y: float, colour: str) -> None:
    if math.isfinite(y):
        panel.annotate(text, (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=8, color=colour)
