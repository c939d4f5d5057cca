"""`caravan demo`: a server of four ranks, several prompts at once, text as it streams, and who computed what."""

import argparse
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cluster.errors import ExitCode, ServerError
from cluster.generate import command_error
from cluster.ports import free_ports
from protos import inference_pb2
from protos.client import Client, Completion, add_response, make_request
from protos.errors import CaravanError

PROMPTS = (
    "Call me Ishmael.",
    "In the beginning God created",
    "Fellow-Citizens of the Senate",
)
RANKS = 4
MAX_TOKENS = 160
TEMPERATURE = 0.7
SEED = 5
START_BOUND_S = 180.0
STOP_BOUND_S = 15.0


@dataclass
class _Stream:
    """One prompt and its answer so far; its thread writes, the terminal's reads."""

    prompt: str
    completion: Completion = field(default_factory=Completion)
    error: CaravanError | None = None
    started: float = 0.0
    first_token_s: float = 0.0
    seconds: float = 0.0

    def run(self, client: Client) -> None:
        self.started = time.monotonic()
        request = make_request(self.prompt, max_tokens=MAX_TOKENS, temperature=TEMPERATURE, seed=SEED)
        try:
            for response in client.generate(request):
                if not self.completion.token_ids:
                    self.first_token_s = time.monotonic() - self.started
                add_response(self.completion, response)
        except CaravanError as error:
            self.error = error
        self.seconds = time.monotonic() - self.started


def run(_arguments: argparse.Namespace) -> int:
    """Show it all and end the server again.

    Raises:
        ServerError: the server did not start, or a stream failed.
    """
    console = Console(highlight=False)
    console.print(
        f"A server of {RANKS} ranks on nano, a small model of Maverick's shape trained on old books: expect English, "
        "not sense."
    )
    with _server(["--ranks", str(RANKS)]) as address, Client(address) as client:
        try:
            served = client.get_model()
            console.print(
                f"{address} serves {served.name}: {served.num_moe_layers} MoE layers of {served.num_experts} experts, "
                f"computed in {served.dtype}.",
                markup=False,
            )
            streams = _stream_all(client, console)
            status = _settled_status(client)
        except CaravanError as error:
            raise command_error(error) from None
        failed = next((stream.error for stream in streams if stream.error is not None), None)
        if failed is not None:
            raise command_error(failed)
        _show_streams(console, streams)
        _show_ranks(console, status)
    return ExitCode.OK


def _stream_all(client: Client, console: Console) -> list[_Stream]:
    streams = [_Stream(prompt) for prompt in PROMPTS]
    threads = [threading.Thread(target=stream.run, args=(client,), daemon=True) for stream in streams]
    for thread in threads:
        thread.start()
    if console.is_terminal:
        with Live(console=console, refresh_per_second=15) as live:
            while any(thread.is_alive() for thread in threads):
                live.update(_panels(streams, console.width))
                time.sleep(0.05)
            live.update(_panels(streams, console.width))
    else:
        for stream, thread in zip(streams, threads, strict=True):
            thread.join()
            console.print(f"--- {stream.prompt}{stream.completion.text}", markup=False, soft_wrap=True)
    return streams


def _settled_status(client: Client) -> inference_pb2.Status:
    """Ranks report about once a second: wait until their numbers stand still."""
    before, deadline = client.get_status(), time.monotonic() + 6
    while True:
        time.sleep(1.5)
        status = client.get_status()
        if status == before or time.monotonic() > deadline:
            return status
        before = status


def _panels(streams: list[_Stream], width: int) -> Columns:
    across = max(1, min(len(streams), width // 36))
    return Columns(
        [
            Panel(
                Text.assemble((stream.prompt, "bold"), stream.completion.text),
                width=width // across - 1,
                subtitle=f"{len(stream.completion.token_ids)} tokens",
            )
            for stream in streams
        ],
        padding=(0, 0),
    )


def _show_streams(console: Console, streams: list[_Stream]) -> None:
    table = Table("prompt", "tokens", "first token, ms", "all, s", "ended by", title="streams")
    for stream in streams:
        table.add_row(
            Text(stream.prompt),
            str(len(stream.completion.token_ids)),
            f"{stream.first_token_s * 1000:.0f}",
            f"{stream.seconds:.2f}",
            stream.completion.finish_reason,
        )
    console.print(table)


def _show_ranks(console: Console, status: inference_pb2.Status) -> None:
    table = Table("rank", "experts held", "tokens computed", "tokens exchanged", "weights read, MB", title="ranks")
    for gang in status.gangs:
        for rank in gang.ranks:
            cells = (rank.rank, rank.experts, rank.tokens_computed, rank.tokens_exchanged)
            table.add_row(*map(str, cells), f"{rank.weights_bytes_read / 1e6:.1f}")
    console.print(table)


@contextmanager
def _server(arguments: list[str]) -> Iterator[str]:
    """A `caravan serve` beside this process, by its address; ended when the block is.

    Raises:
        ServerError: it did not start.
    """
    grpc_port, http_port, metrics_port = free_ports(3)
    ports = ["--grpc-port", str(grpc_port), "--http-port", str(http_port), "--metrics-port", str(metrics_port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "serve", *arguments, *ports], stdout=subprocess.PIPE, text=True
    )
    # A start that hangs must end too; the server says itself what it waits for.
    timer = threading.Timer(START_BOUND_S, process.terminate)
    timer.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        timer.cancel()
        if not line.startswith("ready "):
            raise ServerError("the demo's server did not start; its reason is above")
        yield f"127.0.0.1:{grpc_port}"
    finally:
        timer.cancel()
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_BOUND_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
