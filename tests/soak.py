"""A real server under the same load for a long time: does anything grow, does anything get lost.

    make soak            # 20 minutes; prints a table, and ends with 1 where a goal is missed

Sixteen streams, each followed by the next. Judged are

* failed streams: none;
* memory of every rank and router, proportional set size (PSS): the median of the last fifth of the samples over that of
  the first fifth after the warm-up;
* the gap between messages: the least-squares line through its p50 in windows of 10 s must not rise, over the whole run,
  by more than the goal and by more than three standard errors;
* KV blocks: when the load is over, nothing runs or waits on any rank and no block is in use.

A run of less than ten minutes has wider goals (SHORT): it shows that the soak works, not that the server stands it.
"""

import argparse
import asyncio
import itertools
import math
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster.bench_drive import drive_closed
from cluster.bench_grpc import GrpcTarget
from cluster.bench_load import Load, Mix, Prompts, Shape
from cluster.bench_stream import Stream
from cluster.bench_summary import percentile
from protos.client import Client
from tests.e2e.serving import Server

STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 128, 64
WINDOW_S = 10.0
FEWEST_WINDOWS = 6
IDLE_BOUND_S = 15.0
MUST_BE_ZERO = ("caravan_kv_usage_ratio", "caravan_sequences_running", "caravan_sequences_waiting")


@dataclass(frozen=True)
class Goals:
    """Most that is allowed, as shares."""

    memory_growth: float
    gap_rise: float


LONG = Goals(memory_growth=0.02, gap_rise=0.05)
SHORT = Goals(memory_growth=0.15, gap_rise=1.0)


@dataclass(frozen=True)
class Line:
    """A straight line through points by least squares."""

    mean: float
    slope: float
    slope_error: float
    """Standard error of the slope."""

    def rises(self, span: float, goal: float) -> bool:
        """Over `span`, by more than `goal` of the mean, and not by chance."""
        return self.slope * span > goal * self.mean and self.slope > 3 * self.slope_error


@dataclass
class Soaked:
    """What a soak saw."""

    seconds: float
    streams: list[Stream]
    memory: dict[str, list[int]]
    """PSS of each process over time, bytes."""
    gaps: list[tuple[float, float]]
    """Windows: its middle in seconds since the start, the p50 of its gaps in ms."""
    left: dict[str, float] = field(default_factory=dict)
    """Series that should be 0 after the load and are not."""
    gone: list[str] = field(default_factory=list)
    """Processes that ended meanwhile."""


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """At least three points."""
    xs, ys = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(xs, ys)
    spread = sum((x - statistics.fmean(xs)) ** 2 for x in xs)
    residual = sum((y - intercept - slope * x) ** 2 for x, y in points)
    return Line(statistics.fmean(ys), slope, math.sqrt(residual / (len(points) - 2) / spread))


def growth(samples: Sequence[int]) -> float:
    """Of the last fifth over the first."""
    fifth = max(1, len(samples) // 5)
    return statistics.median(samples[-fifth:]) / statistics.median(samples[:fifth]) - 1


def gap_windows(streams: Sequence[Stream], start: float, seconds: float) -> list[tuple[float, float]]:
    width = min(WINDOW_S, seconds / FEWEST_WINDOWS)
    windows: dict[int, list[float]] = defaultdict(list)
    for stream in streams:
        for before, after in itertools.pairwise(stream.arrivals):
            windows[int((after - start) / width)].append(after - before)
    # After the end streams only run out, one by one.
    whole = range(int(seconds / width))
    return [((number + 0.5) * width, percentile(windows[number], 0.5) * 1e3) for number in whole if windows[number]]


def watched(server: Server) -> dict[str, int]:
    """Process ids of ranks and routers by a name for each."""
    with Client(server.address) as client:
        found = {f"rank {rank.rank}": rank.pid for gang in client.get_status().gangs for rank in gang.ranks}
    routers = [process.pid for process in server.left if "ServeReplica:caravan:Router" in " ".join(process.cmdline())]
    assert found and routers, "a server has ranks and routers"
    return found | {f"router {number}": pid for number, pid in enumerate(sorted(routers))}


def pss(pid: int) -> int:
    """Bytes; 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def not_zero(server: Server) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as answer:
        exposition = answer.read().decode()
    return {
        f"{sample.name} of rank {sample.labels.get('rank')}": sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
        if sample.name in MUST_BE_ZERO and sample.value
    }


async def soak(server: Server, seconds: float, streams: int = STREAMS) -> Soaked:
    """Load the server for so long, and then until it is idle."""
    target = GrpcTarget(server.address)
    facts = await target.open()
    shape = Shape(Mix(), PROMPT_TOKENS, OUTPUT_TOKENS)
    prompts = Prompts(shape, facts.tokens_end, str(time.time_ns()))
    memory: dict[str, list[int]] = defaultdict(list)

    def send():
        return target.stream(prompts.next(), OUTPUT_TOKENS)

    async def sample() -> None:
        while True:
            for name, pid in pids.items():
                memory[name].append(await asyncio.to_thread(pss, pid))
            await asyncio.sleep(max(0.5, seconds / 240))

    warm_up = await drive_closed(send, Load(streams=streams, seconds=min(60.0, seconds / 5)))
    pids = watched(server)
    started = {pid: psutil.Process(pid).create_time() for pid in pids.values()}
    start = time.perf_counter()
    sampler = asyncio.create_task(sample())
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=1) as progress:
        task = progress.add_task(f"{streams} streams", total=1.0)
        done = await drive_closed(
            send, Load(streams=streams, seconds=seconds), lambda share: progress.update(task, completed=share)
        )
    sampler.cancel()
    gaps = gap_windows(done.streams, start, seconds)
    soaked = Soaked(done.seconds, [*warm_up.streams, *done.streams], memory, gaps, not_zero(server))
    while soaked.left and time.perf_counter() - start < done.seconds + IDLE_BOUND_S:
        await asyncio.sleep(0.5)
        soaked.left = not_zero(server)
    await target.close()
    after = watched(server)
    same = {pid for pid in after.values() if psutil.Process(pid).create_time() == started.get(pid)}
    soaked.gone = [name for name, pid in pids.items() if pid not in same]
    return soaked


def judge(soaked: Soaked, goals: Goals) -> tuple[Table, list[str]]:
    """The table, and a sentence for each goal that was missed."""
    table = Table("", "seen", "goal", title=f"{soaked.seconds / 60:.1f} minutes")
    missed = []

    def row(what: str, seen: str, goal: str, met: bool) -> None:
        table.add_row(what, seen, goal, style="" if met else "red")
        if not met:
            missed.append(f"{what}: {seen}, the goal is {goal}")

    failed = [stream for stream in soaked.streams if stream.failed]
    why = f", the first with {failed[0].error}: {failed[0].detail}" if failed else ""
    row("streams failed", f"{len(failed)} of {len(soaked.streams)}{why}", "0", not failed)
    tokens = sum(stream.output_tokens for stream in soaked.streams)
    table.add_row("output tokens", str(tokens), "")
    for name, samples in soaked.memory.items():
        grown = growth(samples)
        seen = f"{samples[0] / 1e6:.1f} to {samples[-1] / 1e6:.1f} MB, {grown:+.2%}"
        row(f"memory of {name} (PSS)", seen, f"≤ +{goals.memory_growth:.0%}", grown <= goals.memory_growth)
    row("processes that ended", ", ".join(soaked.gone) or "0", "0", not soaked.gone)
    if len(soaked.gaps) < 3:
        row("windows with gaps", str(len(soaked.gaps)), "at least 3", False)
    else:
        line, span = fit(soaked.gaps), soaked.gaps[-1][0] - soaked.gaps[0][0]
        seen = (
            f"{line.mean:.1f} ms; {line.slope * 60:+.3f} ± {line.slope_error * 60:.3f} ms a minute, "
            f"{line.slope * span / line.mean:+.1%} over the run"
        )
        row("gap p50 by window", seen, f"≤ +{goals.gap_rise:.0%}, or 3 errors", not line.rises(span, goals.gap_rise))
    row(
        "left when idle",
        ", ".join(f"{name} = {value:g}" for name, value in soaked.left.items()) or "0",
        "0",
        not soaked.left,
    )
    return table, missed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="A real server under load for long.")
    parser.add_argument("--minutes", type=float, default=20.0, help="(default 20)")
    parser.add_argument("--streams", type=int, default=STREAMS, help=f"at once (default {STREAMS})")
    parser.add_argument("--ranks", type=int, default=2, help="(default 2)")
    arguments = parser.parse_args()
    if arguments.minutes <= 0 or arguments.streams < 1:
        parser.error("--minutes and --streams must be more than 0")
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "server", "--ranks", str(arguments.ranks))
        try:
            server.wait_ready()
            soaked = asyncio.run(soak(server, arguments.minutes * 60, arguments.streams))
        finally:
            server.end()
            server.kill_all()
    table, missed = judge(soaked, LONG if arguments.minutes >= 10 else SHORT)
    Console(width=120 if not sys.stdout.isatty() else None).print(table)
    for sentence in missed:
        print(f"missed: {sentence}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
