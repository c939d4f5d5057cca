"""`caravan bench`: how fast a server is, and how it compares with others on the same machine."""

import argparse
import asyncio
import importlib
import json
import secrets
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from cluster.bench_load import Load, Shape, parse_mix
from cluster.bench_machine import machine
from cluster.bench_report import as_dict
from cluster.bench_rounds import Plan, Result, Server, open_servers, run_rounds
from cluster.bench_tables import failed_in_all, failures, letter, show
from cluster.bench_target import make_target
from cluster.errors import ExitCode, ServerError, UsageError

DEFAULT_STREAMS = (1, 8, 64)
DEFAULT_OPEN_SECONDS = 20.0
STREAMS_A_CONNECTION = 16
MOST_CONNECTIONS = 8
# Where stdout is no terminal.
TABLE_WIDTH = 120


def run(arguments: argparse.Namespace) -> int:
    """Print the tables, and write what else was asked for.

    Raises:
        UsageError: the flags do not go together, or a server cannot take the load.
        ServerError: a server is not there, or a stream failed.
    """
    plan = make_plan(arguments)
    for file in (arguments.json, arguments.png):
        _check_writable(file)
    plot = _plot_module() if arguments.png else None
    on = machine()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        servers, results = runner.run(_bench([arguments.address, *arguments.against], plan))
    width = None if sys.stdout.isatty() else TABLE_WIDTH
    show(Console(highlight=False, width=width), plan, servers, results)
    if arguments.json:
        content = as_dict(plan, servers, results, command=sys.argv, started=started, machine=on)
        _write(arguments.json, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    if plot is not None:
        try:
            plot.draw(arguments.png, plan, servers, results, _caption(on, started))
        except OSError as error:
            raise UsageError(f"--png {arguments.png}: cannot be written ({error.strerror})") from None
    failed, requests = failed_in_all(results)
    if failed:
        raise ServerError(f"{failed} of {requests} requests failed: {next(failures(servers, results))}")
    return ExitCode.OK


def make_plan(arguments: argparse.Namespace) -> Plan:
    """What the flags ask for.

    Raises:
        UsageError: they do not go together.
    """
    mix = parse_mix(arguments.mix, arguments.prompt_tokens)
    if arguments.rate and arguments.streams:
        raise UsageError("--streams is a closed load and --rate an open one; give one of them")
    if arguments.rate and mix.kind == "long-prompt":
        raise UsageError("--mix long-prompt: needs running streams; give --streams, not --rate")
    if arguments.rate:
        seconds = arguments.seconds or DEFAULT_OPEN_SECONDS
        loads = tuple(Load(rate=rate, seconds=seconds) for rate in arguments.rate)
    else:
        loads = tuple(Load(streams=count, seconds=arguments.seconds) for count in arguments.streams or DEFAULT_STREAMS)
    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    return Plan(loads, Shape(mix, arguments.prompt_tokens, arguments.output_tokens), arguments.rounds, seed)


async def _bench(addresses: Sequence[str], plan: Plan) -> tuple[list[Server], list[Result]]:
    peak = max(load.streams or STREAMS_A_CONNECTION * 4 for load in plan.loads)
    connections = min(MOST_CONNECTIONS, -(-peak // STREAMS_A_CONNECTION))
    targets = [make_target(address, connections) for address in addresses]
    display = _Display(plan, len(targets))
    try:
        servers = await open_servers(targets, plan.shape)
        display.start()
        return servers, await run_rounds(servers, plan, display.tell)
    finally:
        display.close()
        for target in targets:
            await target.close()


class _Display:
    """A bar on a terminal, a line a measurement elsewhere; on stderr. Few refreshes: the servers need the machine."""

    def __init__(self, plan: Plan, servers: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._is_terminal = self._console.is_terminal
        self._rounds = plan.rounds
        self._all = plan.rounds * len(plan.loads) * servers
        self._done = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=self._console,
            refresh_per_second=2,
            transient=True,
            disable=not self._is_terminal,
        )
        self._task = self._progress.add_task("warm-up", total=self._all)

    def start(self) -> None:
        self._progress.start()

    def tell(self, round_: int, result: Result, share: float) -> None:
        text = f"round {round_ + 1} of {self._rounds}, {result.load.name}, {letter(result.server)}"
        is_done = len(result.rounds) > round_
        self._done += is_done
        self._progress.update(self._task, description=text, completed=self._done + (0 if is_done else share))
        if is_done and not self._is_terminal:
            summary = result.rounds[-1]
            failed = f", {summary.failed} failed" if summary.failed else ""
            self._console.print(f"{text}: {summary.output_tokens_per_s:.0f} tok/s{failed}", markup=False)

    def close(self) -> None:
        self._progress.stop()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The client shares the machine with the servers, and uvloop reads a message at half the cost."""
    try:
        new_loop: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module("uvloop").new_event_loop
    except ModuleNotFoundError:
        return None
    return new_loop


def _plot_module() -> ModuleType:
    try:
        return importlib.import_module("cluster.bench_plot")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--png: needs {error.name}, which is not installed; install it with `pip install caravan[bench]`"
        ) from None


def _check_writable(file: Path | None) -> None:
    """Now, not when the work is done."""
    if file is not None and not file.parent.is_dir():
        raise UsageError(f"{file}: there is no folder {file.parent}; make it first")
    if file is not None and file.is_dir():
        raise UsageError(f"{file}: is a folder; give a file")


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror})") from None


def _caption(on: dict[str, Any], started: str) -> str:
    return f"{on['cpu']}, {on['usable_cores']} cores, caravan {on['packages'].get('caravan', '')}, {started}"
