"""`make demo-hosts`: four hosts, a rank pair on each, a prompt from a fifth, and what went from host to host."""

import argparse
import codecs
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from tests.hosts import CellProcess, Host, HostNetwork, HostsError, RayNode, start_ray, why_not

PROMPT = "Call me Ishmael."
PORT = 9000
RAY_BOUND_S = 180.0
READY_BOUND_S = 400.0
TEXT_BOUND_S = 60.0
SETTLE_BOUND_S = 10.0
STOP_BOUND_S = 30.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hosts.demo", description=__doc__)
    parser.add_argument("--hosts", type=int, default=4, metavar="N", help="(default 4)")
    parser.add_argument("--ranks", type=int, default=8, metavar="N", help="of all hosts together (default 8)")
    parser.add_argument("--delay", type=float, default=0.0, metavar="MS", help="of every frame that leaves a host")
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT")
    parser.add_argument("--max-tokens", type=int, default=120, metavar="N", help="(default 120)")
    given = parser.parse_args()
    if not 1 <= given.hosts <= 16 or not given.hosts <= given.ranks <= 64:
        parser.error("--hosts must be from 1 to 16, and --ranks from that many to 64")
    console = Console(highlight=False)
    if reason := why_not():
        console.print(f"demo-hosts makes hosts of network namespaces, and that cannot be done here: {reason}")
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with HostNetwork(given.hosts, client=True) as network:
            _show(network, given, console)
            began = time.monotonic()
    except HostsError as error:
        console.print(Text(f"demo-hosts: {error}", "red"), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    console.print(f"Hosts, network and all their processes are gone ({time.monotonic() - began:.1f} s).")
    return 0


def _show(network: HostNetwork, given: argparse.Namespace, console: Console) -> None:
    names = ", ".join(map(str, network.hosts))
    console.print(f"Hosts, each with its own network, processes, /tmp and name: {names}.", soft_wrap=True)
    if given.delay:
        how = [network.delay(host, given.delay) for host in network.hosts]
        console.print(f"Every frame that leaves one arrives {given.delay:g} ms later, by {how[0]}.")
    head = _start_ray(network, -(-given.ranks // given.hosts), console)
    first, client = network[0], network.client
    address = f"{first.address}:{PORT}"
    with _server(first, head, given.ranks, console):
        console.print(f"[dim]{client}[/]$ caravan generate … --address {address}")
        _stream(client, address, given, console)
        _show_hosts(_settled_status(client, address), console)


def _start_ray(network: HostNetwork, num_cpus: int, console: Console) -> RayNode:
    began = time.monotonic()
    nodes: list[RayNode] = []
    for host in network.hosts:
        nodes.append(start_ray(host, head=nodes[0] if nodes else None, num_cpus=num_cpus))
    with _doing(console, "ray start …") as status:
        for count, node in enumerate(nodes):
            status.update(f"ray start on {node.host}: {count} of {len(nodes)} hosts have joined")
            node.wait(RAY_BOUND_S)
    seconds = time.monotonic() - began
    console.print(f"`ray start` on each: {len(nodes)} joined {nodes[0].address} in {seconds:.0f} s.")
    return nodes[0]


@contextmanager
def _server(host: Host, head: RayNode, ranks: int, console: Console) -> Iterator[None]:
    """A `caravan serve` over all hosts, started on one; ended when the block is."""
    command = ["caravan", "serve", "--ray-address", head.address, "--host", host.address]
    command += ["--grpc-port", str(PORT), "--ranks", str(ranks)]
    console.print(f"[dim]{host}[/]$ {' '.join(command)}", soft_wrap=True)
    began = time.monotonic()
    process = host.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said: list[str] = []
    try:
        with _doing(console, "starting") as status:
            reader = threading.Thread(target=_follow, args=(process, said, status, console), daemon=True)
            reader.start()
            assert process.stdout is not None
            is_said, _, _ = select.select([process.stdout], [], [], READY_BOUND_S)
            line = process.stdout.readline() if is_said else ""
        if not line.startswith("ready "):
            reader.join(1)
            waited = "" if is_said else f" within {READY_BOUND_S:.0f} s"
            raise HostsError(f"the server did not get ready{waited}: {said[-1] if said else 'it said nothing'}")
        console.print(f"{line.strip()} after {time.monotonic() - began:.0f} s")
        yield
        console.print("Ending the server.")
    finally:
        process.terminate()
        try:
            process.wait(STOP_BOUND_S)
        except subprocess.TimeoutExpired:
            process.kill()  # The hosts go next, and with them whatever it leaves.
            process.wait()


def _follow(process: CellProcess, said: list[str], status: Status, console: Console) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line.strip())
        status.update(Text(said[-1]))
        if not console.is_terminal:
            console.print(f"  {said[-1]}", markup=False, soft_wrap=True)


def _stream(client: Host, address: str, given: argparse.Namespace, console: Console) -> None:
    """Text as it comes."""
    command = ["caravan", "generate", given.prompt, "--address", address, "--max-tokens", str(given.max_tokens)]
    process = client.popen([*command, "--temperature", "0.7", "--seed", "5"], stdout=subprocess.PIPE)
    console.print(Text(given.prompt, "bold"), end="")
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    began = time.monotonic()
    first = 0.0
    with process:
        assert process.stdout is not None
        while chunk := _read(process):
            first = first or time.monotonic() - began
            console.print(decode(chunk), end="", markup=False, soft_wrap=True)
    if process.returncode:
        raise HostsError(f"`caravan generate` on {client} ended with {process.returncode}; its reason is above")
    whole = time.monotonic() - began
    console.print(f"[dim](first text {first:.1f} s after the command, all after {whole:.1f} s)[/]\n")


def _read(process: CellProcess) -> bytes:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], TEXT_BOUND_S)
    if not ready:
        process.kill()
        raise HostsError(f"no text came for {TEXT_BOUND_S:.0f} s")
    return os.read(process.stdout.fileno(), 65536)


def _settled_status(client: Host, address: str) -> dict[str, Any]:
    """Ranks report about once a second: wait until their numbers stand still."""
    before: dict[str, Any] = {}
    deadline = time.monotonic() + SETTLE_BOUND_S
    while True:
        done = client.run(["caravan", "status", "--json", "--address", address], check=True)
        status: dict[str, Any] = json.loads(done.stdout)
        if status == before or time.monotonic() > deadline:
            return status
        before = status
        time.sleep(1.5)


def _show_hosts(status: dict[str, Any], console: Console) -> None:
    for gang in status["gangs"]:
        ranks = {rank["rank"]: rank for rank in gang["ranks"]}
        columns = ("host", "name", "via", "ranks", "experts", "MB within", "to others", "trip, ms")
        table = Table(*columns, title=f"{gang['id']}, epoch {gang['epoch']}: {len(ranks)} ranks, and what they sent")
        for host in gang["hosts"]:
            own = [ranks[rank] for rank in host["ranks"]]
            trips = sorted(host["round_trip_seconds"].values())
            table.add_row(
                host["host"],
                host["hostname"],
                host["interface"],
                ", ".join(map(str, host["ranks"])),
                str(sum(rank["experts"] for rank in own)),
                f"{sum(rank['bytes_within_host'] for rank in own) / 1e6:.2f}",
                f"{sum(rank['bytes_between_hosts'] for rank in own) / 1e6:.2f}",
                f"{trips[0] * 1e3:.1f}–{trips[-1] * 1e3:.1f}" if trips else "",
            )
        console.print(table)


@contextmanager
def _doing(console: Console, text: str) -> Iterator[Status]:
    """On a terminal, a line that says what is being done now."""
    status = console.status(text)
    if not console.is_terminal:
        yield status
        return
    with status:
        yield status


if __name__ == "__main__":
    sys.exit(main())
