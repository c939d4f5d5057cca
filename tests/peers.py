"""Caravan beside a peer on this machine: whole servers, the same checkpoint, the same load, in alternation.

    make peers ARGS="--vllm VENV --checkpoint DIR"
    make peers ARGS="--vllm VENV --checkpoint DIR --ranks 1,2 --json peers.json"

VENV is a virtual environment with vLLM's CPU build; it is started with tensor parallelism over two processes, a core
each, bfloat16, prefix cache off:

    VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND='0|1' vllm serve DIR --dtype bfloat16 --max-model-len 4096 \\
        --tensor-parallel-size 2 --no-enable-prefix-caching

Caravan is `caravan serve --model DIR --ranks N`, its prefix cache off too (`[serve] prefix_cache = false`), and else as
it comes; with several N there are several of it. All servers are up the whole time. Each is loaded once before anything
counts. Then, round by round and load by load, all are measured in turn, over HTTP: 128 prompt tokens, 64 output tokens,
greedy, 1, 8 and 64 streams. The numbers are medians of the rounds. The last lines say what each server took of the
machine while others were measured: one that does not rest when it is idle would spoil the comparison.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.bench_load import Load, Mix, Shape
from cluster.bench_machine import machine
from cluster.bench_report import as_dict
from cluster.bench_rounds import Plan, Result, Server, open_servers, run_rounds
from cluster.bench_tables import show
from cluster.bench_target import make_target
from cluster.errors import CommandError
from cluster.ports import free_ports
from tests.e2e import serving

STREAMS = (1, 8, 64)
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
# A server compiles and fills what it needs with its first full load.
WARM_UP_STREAMS = 64
# Before each load: vLLM's processes go on polling for a second after their last step, on both cores.
REST_S = 2.0
PEER_READY_BOUND_S, PEER_END_BOUND_S = 600.0, 30.0
PEER_FLAGS = ("--dtype", "bfloat16", "--max-model-len", "4096", "--no-enable-prefix-caching")
PEER_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
}


class StartError(Exception):
    """A server did not start."""


@dataclasses.dataclass(frozen=True)
class Started:
    """A server that is ready."""

    name: str
    url: str
    metrics: str | None
    processes: list[psutil.Process]
    seconds: float
    """From its start until it was ready."""


@contextmanager
def start_caravan(folder: Path, checkpoint: Path, ranks: int) -> Iterator[Started]:
    """A server that is ready; nothing of it is left when the context ends."""
    began = time.perf_counter()
    folder.mkdir(exist_ok=True)
    config = folder / "caravan.toml"
    config.write_text("[serve]\nprefix_cache = false\n", encoding="utf-8")
    server = serving.Server(folder, "--model", str(checkpoint), "--ranks", str(ranks), "--config", str(config))
    try:
        try:
            server.wait_ready()
        except AssertionError as error:
            raise StartError(f"caravan, {ranks} ranks: {error}") from None
        name = f"caravan, {ranks} rank{'s' if ranks != 1 else ''}"
        metrics = f"http://{server.metrics}/metrics"
        yield Started(name, f"http://{server.http}", metrics, server.left, time.perf_counter() - began)
    finally:
        server.end()
        server.kill_all()


@contextmanager
def start_vllm(folder: Path, venv: Path, checkpoint: Path) -> Iterator[Started]:
    """The same of the peer."""
    began = time.perf_counter()
    (port,) = free_ports(1)
    path = f"{venv / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [venv / "bin/vllm", "serve", checkpoint, "--host", "127.0.0.1", "--port", str(port), *PEER_FLAGS]
    command += ["--tensor-parallel-size", "2"]
    log = folder / "vllm.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            env={**os.environ, **PEER_ENV, "PATH": path},
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=folder,
            # Its helpers rewrite their titles, and with them their environment: only the session tells whose they are.
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_healthy(process, url, log)
        yield Started("vLLM, tensor parallel 2", url, None, _session(process.pid), time.perf_counter() - began)
    finally:
        shared = _shared_memory(_session(process.pid))
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PEER_END_BOUND_S)
        except subprocess.TimeoutExpired:
            pass
        left = _session(process.pid)
        shared |= _shared_memory(left)
        for one in left:
            # That helper cleans up after the others, and then ends by itself.
            if "resource_tracker" not in " ".join(_command(one)):
                one.kill()
        process.wait(10)
        for one in psutil.wait_procs(left, timeout=5)[1]:
            one.kill()
        # It leaves some of it behind, even when it is ended politely.
        for path in shared:
            path.unlink(missing_ok=True)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _session(leader: int) -> list[psutil.Process]:
    """Living processes of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def _shared_memory(processes: Sequence[psutil.Process]) -> set[Path]:
    """Files in /dev/shm that these have mapped."""
    paths = set()
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        paths |= {Path(line.split()[-1]) for line in lines if " /dev/shm/" in line and not line.endswith("(deleted)")}
    return paths


def _wait_healthy(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + PEER_READY_BOUND_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            pass
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        if process.poll() is not None:
            raise StartError(f"vLLM ended with {process.returncode}; its last words:\n{tail}")
        if time.monotonic() > deadline:
            raise StartError(f"vLLM was not ready after {PEER_READY_BOUND_S:.0f} s; its last words:\n{tail}")
        time.sleep(0.5)


class Idleness:
    """How much of the machine the servers use that are not being measured."""

    def __init__(self, servers: Sequence[Started]) -> None:
        self._processes = [server.processes for server in servers]
        self._before: list[float] = []
        self._since = 0.0
        self.cores: list[list[float]] = [[] for _ in servers]
        """Of each server, one share of a core for each time another one was measured."""

    def begin(self) -> None:
        self._before, self._since = [_cpu_seconds(mine) for mine in self._processes], time.perf_counter()

    def end(self, measured: int) -> None:
        passed = time.perf_counter() - self._since
        for number, mine in enumerate(self._processes):
            if number != measured:
                self.cores[number].append((_cpu_seconds(mine) - self._before[number]) / passed)


def _cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


async def compare(
    started: Sequence[Started], rounds: int, streams: Sequence[int], seed: int, console: Console
) -> tuple[Plan, list[Server], list[Result], Idleness]:
    """Warm all, then alternate."""
    shape = Shape(Mix(), PROMPT_TOKENS, OUTPUT_TOKENS)
    targets = [make_target(one.url, 1) for one in started]
    plan = Plan(tuple(Load(streams=count) for count in streams), shape, rounds, seed)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    display = Progress(*columns, console=console, transient=True, refresh_per_second=1, disable=not console.is_terminal)
    idleness = Idleness(started)
    try:
        servers = [
            dataclasses.replace(server, metrics=one.metrics)
            for server, one in zip(await open_servers(targets, shape), started, strict=True)
        ]
        with display:
            task = display.add_task("warm-up", total=rounds * len(streams) * len(started))
            warm = Plan((Load(streams=min(WARM_UP_STREAMS, max(streams))),), shape, 1, seed + 1)
            await run_rounds(servers, warm, lambda *_: None)

            def tell(round_: int, result: Result, share: float) -> None:
                text = f"round {round_ + 1} of {rounds}, {result.load.name}, {started[result.server].name}"
                display.update(task, description=text)
                if len(result.rounds) == round_:
                    if share == 0:
                        # No stream runs now, so the loop may wait.
                        time.sleep(REST_S)
                        idleness.begin()
                    return
                idleness.end(result.server)
                display.advance(task)
                if not console.is_terminal:
                    console.print(f"{text}: {result.rounds[-1].output_tokens_per_s:.0f} tok/s", markup=False)

            return plan, servers, await run_rounds(servers, plan, tell), idleness
    finally:
        for target in targets:
            await target.close()


def pair(results: Sequence[Result], ours: int, theirs: int) -> list[Result]:
    """Results of two servers alone, ours first."""
    numbers = {ours: 0, theirs: 1}
    return [dataclasses.replace(one, server=numbers[one.server]) for one in results if one.server in numbers]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description="Caravan beside a peer.")
    parser.add_argument(
        "--vllm", type=Path, required=True, metavar="VENV", help="virtual environment with vLLM for CPUs"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="what all of them serve")
    parser.add_argument("--ranks", type=_numbers, default=(2,), metavar="N[,N]", help="of Caravan (default 2)")
    parser.add_argument("--streams", type=_numbers, default=STREAMS, metavar="N[,N]", help="(default 1,8,64)")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    arguments = parser.parse_args()
    if not os.access(arguments.vllm / "bin/vllm", os.X_OK):
        parser.error(f"--vllm {arguments.vllm}: there is no bin/vllm in it; name a virtual environment with vLLM")
    if not (arguments.checkpoint / "config.json").is_file():
        parser.error(f"--checkpoint {arguments.checkpoint}: there is no config.json in it; name a checkpoint's folder")
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no folder {arguments.json.parent}; make it first")
    return arguments


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"must be whole numbers from 1, with commas between them, got {text!r}")
    return tuple(map(int, parts))


def main() -> int:
    arguments = _arguments()
    # Whoever ends this ends its servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    on, began = machine(), datetime.now(UTC).isoformat(timespec="seconds")
    console = Console(stderr=True, highlight=False)
    checkpoint = arguments.checkpoint.absolute()
    try:
        with tempfile.TemporaryDirectory(prefix="caravan-peers-") as name, ExitStack() as stack:
            folder, started = Path(name), []
            # One after the other: each has the machine to itself while it starts.
            console.print("starting vLLM (about a minute)")
            peer = stack.enter_context(start_vllm(folder, arguments.vllm.absolute(), checkpoint))
            console.print(f"{peer.name}: ready after {peer.seconds:.0f} s")
            for ranks in arguments.ranks:
                started.append(stack.enter_context(start_caravan(folder / f"ranks{ranks}", checkpoint, ranks)))
                console.print(f"{started[-1].name}: ready after {started[-1].seconds:.0f} s")
            started.append(peer)
            plan, servers, results, idleness = asyncio.run(
                compare(started, arguments.rounds, arguments.streams, arguments.seed, console)
            )
    except (StartError, CommandError) as error:
        print(f"peers: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    out = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    theirs = len(started) - 1
    for ours in range(theirs):
        out.print(f"\nA is {started[ours].name}, B is {peer.name}", markup=False)
        show(out, plan, [servers[ours], servers[theirs]], pair(results, ours, theirs))
    for one, cores in zip(started, idleness.cores, strict=True):
        took = f"median {statistics.median(cores):.1%} of a core, at most {max(cores):.1%}"
        out.print(f"{one.name}, while others were measured: {took}", markup=False)
    if arguments.json is not None:
        content = as_dict(plan, servers, results, command=sys.argv, started=began, machine=on)
        for server, one, cores in zip(content["servers"], started, idleness.cores, strict=True):
            server |= {"name": one.name, "ready_after_s": one.seconds, "idle_cores": cores}
        arguments.json.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    failed = sum(one.failed for result in results for one in result.rounds)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
