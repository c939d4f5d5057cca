"""How cost grows: a real server at more and more streams, prompt tokens, experts and ranks.

    make growth ARGS="--out FOLDER"                  # growth.png, growth.json and a table; about ten minutes on 2 cores
    make growth ARGS="--out FOLDER --axis streams"   # one axis; may be given several times

streams   1 to 256 at once, 128 prompt and 64 output tokens: output tokens a second
prompt    128 to 32,768 prompt tokens, one stream: prompt tokens a second until the first token, and that time
experts   16 to 512 routed experts, at 1, 8 and 64 streams. All of these checkpoints have an expert MLP of 256, half
          that of the other axes' (512 would write 3.3 GB twice); nothing else differs
ranks     1, 2, 4 and 8 on this machine, at 1, 8 and 64 streams

Checkpoints are made by tests/growth_checkpoints.py in a temporary folder, and removed as soon as no point needs them.
What has the same server is measured in turn, round by round, so that what disturbs the machine disturbs all alike;
numbers are medians of the rounds. Prefix caches are off. A bend is where two straight lines, on logarithmic axes, fit a
curve much better than one does.
"""

import argparse
import asyncio
import importlib
import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from shutil import rmtree
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.bench_drive import drive, warm_up
from cluster.bench_load import Mix, Prompts, Shape
from cluster.bench_machine import machine
from cluster.bench_steps import SETTLE_S, UNEXPLAINED, RankSteps, Steps, add, growth, read_steps, scrape
from cluster.bench_summary import Summary, median, summarise
from cluster.bench_target import Target, make_target
from cluster.errors import CommandError
from tests.growth_bend import Bend, find_bend
from tests.growth_points import AXES, USUAL_PROMPT, Point, make_points, short_points
from tests.growth_server import Folders

CONNECTIONS = 8


@dataclass
class Measured:
    """A point's rounds."""

    point: Point
    rounds: list[Summary] = field(default_factory=list)
    steps: list[Steps] = field(default_factory=list)

    @cached_property
    def median(self) -> Summary:
        """Ask when all rounds are over."""
        return median(self.rounds)

    @property
    def rates(self) -> list[float]:
        """Of each round: output tokens a second; of the prompt axis prompt tokens a second until the first token."""
        if self.point.axis == "prompt":
            return [self.point.x / (one.first_token.p50 / 1e3) for one in self.rounds]
        return [one.output_tokens_per_s for one in self.rounds]

    @property
    def rate(self) -> float:
        """The median over rounds."""
        rates = sorted(rate for rate in self.rates if math.isfinite(rate))
        return (rates[(len(rates) - 1) // 2] + rates[len(rates) // 2]) / 2 if rates else math.nan

    @property
    def all_steps(self) -> RankSteps:
        """Of all ranks and rounds together."""
        ranks = add(self.steps).values()
        return add({("", ""): rank} for rank in ranks).get(("", ""), RankSteps())


Tell = Callable[[int, Measured], None]
"""Is told the round, from 0, and what was measured in it."""


async def measure(
    address: str, metrics: str, points: Sequence[Point], rounds: int, seed: int, tell: Tell
) -> list[Measured]:
    """Every point on one server, one after the other, and so again for each round.

    Args:
        address, metrics: HOST:PORT of the gRPC door and of the metrics.

    Raises:
        CommandError: the server does not answer.
    """
    target = make_target(address, CONNECTIONS)
    measured = [Measured(point) for point in points]
    try:
        facts = await target.open()
        shape = Shape(Mix(), min(USUAL_PROMPT, points[0].prompt_tokens), points[0].output_tokens)
        await warm_up(target, Prompts(shape, facts.tokens_end, f"{seed}/warm-up"), shape.output_tokens)
        for round_ in range(rounds):
            for one in measured:
                await _measure_once(target, f"http://{metrics}/metrics", one, facts.tokens_end, f"{seed}/{round_}")
                tell(round_, one)
    finally:
        await target.close()
    return measured


async def _measure_once(target: Target, metrics: str, one: Measured, tokens_end: int, seed: str) -> None:
    point = one.point
    shape = Shape(Mix(), point.prompt_tokens, point.output_tokens)
    seed = f"{seed}/{point.axis}/{point.name}"
    before = await _steps(metrics)
    done = await drive(target, point.load, shape, Prompts(shape, tokens_end, seed), seed)
    after = await _steps(metrics)
    one.rounds.append(summarise(done))
    one.steps.append(growth(before, after))


async def _steps(metrics: str) -> Steps:
    await asyncio.sleep(SETTLE_S)
    return read_steps(await asyncio.to_thread(scrape, metrics) or "")


def bends(measured: Sequence[Measured]) -> dict[tuple[str, str], Bend]:
    """Of each axis' curves that have one."""
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for one in measured:
        curves.setdefault((one.point.axis, one.point.curve), []).append((one.point.x, one.rate))
    found = {curve: find_bend(sorted(points)) for curve, points in curves.items()}
    return {curve: bend for curve, bend in found.items() if bend is not None}


def make_table(measured: Sequence[Measured]) -> Table:
    """A row a point."""
    table = Table("axis", "point", "tok/s", "least–most", "first token", "gap", "ms a step", "largest parts", "failed")
    table.caption = (
        "tok/s of the prompt axis: prompt tokens until the first token; times: p50 / p99 in ms; "
        "parts: shares of the step, over all ranks"
    )
    for number in range(2, 7):
        table.columns[number].justify = "right"
    axis = None
    for one in measured:
        if axis not in (None, one.point.axis):
            table.add_section()
        summary, steps = one.median, one.all_steps
        quantiles = (f"{times.p50:.1f} / {times.p99:.1f}" for times in (summary.first_token, summary.gap))
        table.add_row(
            one.point.axis if axis != one.point.axis else "",
            one.point.name,
            f"{one.rate:.0f}",
            f"{min(one.rates):.0f}–{max(one.rates):.0f}",
            *quantiles,
            f"{steps.seconds / steps.steps * 1e3:.2f}" if steps.steps else "–",
            ", ".join(f"{part} {share:.0%}" for part, share in largest_parts(steps)) or "–",
            f"{summary.failed} of {summary.requests}",
            style="" if summary.failed == 0 else "red",
        )
        axis = one.point.axis
    return table


def failure(one: Measured) -> str:
    """In a sentence, of a point with failed streams."""
    summary = one.median
    return f"{one.point.name}: {summary.failed} of {summary.requests} failed: {next(iter(summary.details.values()))}"


def largest_parts(steps: RankSteps, count: int = 3) -> list[tuple[str, float]]:
    """Names and shares of the step's largest parts."""
    named = [(part, steps.share(part)) for part in steps.parts if part != UNEXPLAINED]
    return sorted(named, key=lambda part: -part[1])[:count]


def as_dict(measured: Sequence[Measured], on: dict[str, Any], started: str, seed: int) -> dict[str, Any]:
    """What growth.json holds. What was not measured is null."""
    content = {
        "command": sys.argv,
        "started": started,
        "machine": on,
        "seed": seed,
        "points": [
            asdict(one.point)
            | {"tokens_per_s": one.rate, "tokens_per_s_of_rounds": one.rates, "median": asdict(one.median)}
            | {"steps": asdict(one.all_steps)}
            for one in measured
        ],
        "bends": [{"axis": axis, "curve": curve, **asdict(bend)} for (axis, curve), bend in bends(measured).items()],
    }
    cleaned: dict[str, Any] = _without_nan(content)
    return cleaned


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    return [_without_nan(one) for one in value] if isinstance(value, (list, tuple)) else value


def run(points: Sequence[Point], rounds: int, seed: int, console: Console) -> tuple[list[Measured], list[str]]:
    """Start each server that is needed, measure its points, end it.

    Returns:
        What was measured, in the order of the axes, and a sentence for each server that failed.
    """
    servers = list(dict.fromkeys(point.server for point in points))
    measured: list[Measured] = []
    failures: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="caravan-growth-") as folder,
        Progress(
            *columns, console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal
        ) as bar,
    ):
        task = bar.add_task("", total=len(points) * rounds)
        folders = Folders(Path(folder))
        for number, spec in enumerate(servers):
            mine = [point for point in points if point.server == spec]
            bar.update(task, description=f"starting {spec.name}")

            def tell(round_: int, one: Measured) -> None:
                bar.update(task, advance=1, description=f"round {round_ + 1} of {rounds}, {one.point.name}")
                if not console.is_terminal:
                    console.print(f"round {round_ + 1} of {rounds}, {one.point.name}: {one.rates[-1]:.0f} tok/s")

            try:
                began = time.perf_counter()
                with folders.serve(spec) as server:
                    console.print(f"{spec.name}: ready after {time.perf_counter() - began:.0f} s")
                    measured += asyncio.run(measure(server.address, server.metrics, mine, rounds, seed, tell))
            except (AssertionError, CommandError) as error:
                failures.append(f"{spec.name}: {error}")
                console.print(failures[-1], markup=False)
            later = {other.checkpoint for other in servers[number + 1 :]}
            if spec.checkpoint is not None and spec.checkpoint not in later:
                rmtree(folders.of(spec.checkpoint), ignore_errors=True)
    measured.sort(key=lambda one: (AXES.index(one.point.axis), one.point.x))
    failures += [failure(one) for one in measured if one.median.failed]
    return measured, failures


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.growth", description="How cost grows.")
    parser.add_argument("--out", type=Path, required=True, help="folder for growth.png and growth.json")
    parser.add_argument("--axis", choices=AXES, action="append", help="only this one (may be given several times)")
    parser.add_argument("--ranks", type=int, default=2, help="of every axis but that of ranks (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts (default 1)")
    for axis in AXES:
        parser.add_argument(f"--most-{axis}", type=int, metavar="N", help="leave out what is greater")
    parser.add_argument("--short", action="store_true", help="one small axis on the model in the package, one round")
    arguments = parser.parse_args()
    if not arguments.out.is_dir():
        parser.error(f"--out {arguments.out}: there is no such folder; make it first")
    if arguments.rounds < 1 or arguments.ranks < 1:
        parser.error("--rounds and --ranks must be at least 1")
    return arguments


def main() -> int:
    arguments = _arguments()
    # Whoever ends this ends its servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    most = {axis: value for axis in AXES if (value := getattr(arguments, f"most_{axis}")) is not None}
    points = short_points() if arguments.short else make_points(arguments.axis or AXES, arguments.ranks, most)
    if not points:
        print("nothing to measure: every point is greater than --most-… allows", file=sys.stderr)
        return 2
    on, started = machine(), datetime.now(UTC).isoformat(timespec="seconds")
    rounds = 1 if arguments.short else arguments.rounds
    try:
        measured, failures = run(points, rounds, arguments.seed, Console(stderr=True, highlight=False))
    except KeyboardInterrupt:
        return 130
    if measured:
        write(arguments.out, measured, on, started, arguments.seed)
        console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
        console.print(make_table(measured))
        for (axis, curve), bend in bends(measured).items():
            console.print(f"{axis}{f', {curve}' if curve else ''}: {bend.sentence}", markup=False)
    for sentence in failures:
        print(f"failed: {sentence}", file=sys.stderr)
    return 1 if failures else 0


def write(folder: Path, measured: Sequence[Measured], on: dict[str, Any], started: str, seed: int) -> None:
    """growth.json and growth.png."""
    content = as_dict(measured, on, started, seed)
    (folder / "growth.json").write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    # Half a second of imports that only the end needs.
    plot = importlib.import_module("tests.growth_plot")
    caption = f"{on['cpu']}, {on['usable_cores']} cores, caravan {on['packages'].get('caravan', '')}, {started}"
    plot.draw(folder / "growth.png", measured, bends(measured), caption)


if __name__ == "__main__":
    sys.exit(main())
