"""`caravan status`: gangs and ranks as a server's router sees them."""

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.errors import ExitCode
from cluster.generate import command_error
from cluster.stages import place
from protos import inference_pb2
from protos.client import Client
from protos.errors import CaravanError


def run(arguments: argparse.Namespace) -> int:
    """Print the status.

    Raises:
        ServerError: the server failed or is not there.
    """
    try:
        with Client(arguments.address) as client:
            status = client.get_status()
    except CaravanError as error:
        raise command_error(error) from None
    if arguments.json:
        print(json.dumps(as_dict(status), ensure_ascii=False, separators=(",", ":")))
    else:
        _show(status)
    return ExitCode.OK


def as_dict(status: inference_pb2.Status) -> dict[str, Any]:
    """The shape of --json: a public contract."""
    return {
        "model": status.model,
        "gangs": [
            {
                "id": gang.id,
                "epoch": gang.epoch,
                "running": gang.running,
                "waiting": gang.waiting,
                "ranks": [
                    {
                        "rank": rank.rank,
                        "incarnation": rank.incarnation,
                        "pid": rank.pid,
                        "host": rank.host,
                        "state": rank.state,
                        "experts": rank.experts,
                        "address": rank.address,
                        "bytes_within_host": rank.bytes_within_host,
                        "bytes_between_hosts": rank.bytes_between_hosts,
                    }
                    for rank in gang.ranks
                ],
                "hosts": [
                    {
                        "host": host.host,
                        "hostname": host.hostname,
                        "interface": host.interface,
                        "ranks": list(host.ranks),
                        "round_trip_seconds": {each.host: each.seconds for each in host.round_trips},
                    }
                    for host in gang.hosts
                ],
            }
            for gang in status.gangs
        ],
    }


def _show(status: inference_pb2.Status) -> None:
    console = Console(highlight=False)
    console.print(f"model {status.model}", markup=False)
    for gang in status.gangs:
        detail = f" ({gang.detail})" if gang.detail else f" ({place(gang.stage)} {gang.stage})" if gang.stage else ""
        console.print(
            f"{gang.id}: {gang.state}{detail}, epoch {gang.epoch}, {gang.running} running, {gang.waiting} waiting",
            markup=False,
        )
        table = Table("rank", "incarnation", "pid", "host", "state", "experts", "tokens computed", "tokens exchanged")
        for rank in gang.ranks:
            cells = (rank.rank, rank.incarnation, rank.pid, rank.host, rank.state, rank.experts)
            table.add_row(*map(str, (*cells, rank.tokens_computed, rank.tokens_exchanged)))
        console.print(table)
        if len(gang.hosts) > 1:
            console.print(host_table(gang))


def host_table(gang: inference_pb2.GangStatus) -> Table:
    """A line a host, with all that its ranks sent."""
    table = Table("host", "name", "interface", "ranks", "sent within", "to other hosts", "round trip")
    ranks = {rank.rank: rank for rank in gang.ranks}
    for host in gang.hosts:
        own = [ranks[rank] for rank in host.ranks if rank in ranks]
        trips = sorted(each.seconds * 1e3 for each in host.round_trips)
        table.add_row(
            host.host,
            host.hostname,
            host.interface,
            ", ".join(map(str, host.ranks)),
            _megabytes(sum(rank.bytes_within_host for rank in own)),
            _megabytes(sum(rank.bytes_between_hosts for rank in own)),
            f"{trips[0]:.2f}-{trips[-1]:.2f} ms" if trips else "",
        )
    return table


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
