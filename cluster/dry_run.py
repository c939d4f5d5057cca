"""`caravan serve --dry-run`: where ranks would go and what they would hold and open. Nothing is started or fetched."""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from cluster.config import ServeConfig, load_config
from cluster.default_model import default_model_dir
from cluster.errors import ExitCode, UsageError
from cluster.fetch import fetched_model
from cluster.footprint import Footprint, runs
from cluster.placement import (
    HostOffer,
    NoRoomError,
    PlacementRequest,
    Plan,
    first_expert_map,
    gpus_per_rank,
    plan,
)
from cluster.ray_hosts import OWN_HOST, hosts_at, this_host
from cluster.serve import SERVE_FLAGS, check
from workers.errors import UserError
from workers.model_config import ModelConfig

PIPE_COLUMNS = 160
"""Of a line where nobody looks at a terminal."""


def run(arguments: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        UsageError: the server could not start: the input cannot work, or there is no room; or a model is not here yet.
    """
    flags = {name: getattr(arguments, name) for name in SERVE_FLAGS}
    config = load_config(flags, arguments.config, default_model_dir())
    config = config.at(fetched_model(config))
    check(config)
    model = ModelConfig.from_folder(config.engine.model_dir)
    try:
        hosts = offers(config)
        show(config, model, hosts, plan_of(config, hosts))
    except (NoRoomError, UserError) as error:
        raise UsageError(str(error)) from None
    return ExitCode.OK


def offers(config: ServeConfig) -> list[HostOffer]:
    """Hosts of the Ray to join, or the one of a Ray of our own, which claims as many logical CPUs as it takes.

    Raises:
        UsageError: no Ray answers.
    """
    serve = config.serve
    return hosts_at(serve.ray_address) if serve.ray_address else [this_host(serve.ranks)]


def plan_of(config: ServeConfig, hosts: list[HostOffer]) -> Plan:
    """Where a deployment's ranks go.

    Raises:
        NoRoomError: nowhere.
        UserError: the configuration does not fit these hosts.
    """
    ranks = config.serve.ranks
    gpus = gpus_per_rank(config.engine.device, ranks, hosts)
    found = plan(PlacementRequest.of(ranks, config.placement, gpus=gpus), hosts)
    for address, own in found.ranks_by_host.items():
        config.network.check_room(len(own), address)
    return found


def show(config: ServeConfig, model: ModelConfig, hosts: list[HostOffer], found: Plan) -> None:
    """Print a plan for `hosts` on stdout."""
    footprint = Footprint(model, config.engine, found, first_expert_map(model, range(config.serve.ranks)))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)
    for line in headline(config, model, found, footprint):
        console.print(line, markup=False, soft_wrap=True)
    console.print(host_table(found, footprint))
    console.print(rank_table(found, footprint))
    console.print(port_table(config, hosts, found))


def headline(config: ServeConfig, model: ModelConfig, found: Plan, footprint: Footprint) -> list[str]:
    """What is served, by how much."""
    hosts = len(found.ranks_by_host)
    where = f"{hosts} host{'s' if hosts != 1 else ''} of the Ray at {config.serve.ray_address}"
    where = where if config.serve.ray_address else "this host, with a Ray of its own"
    experts = f"{model.num_experts} experts in each of {model.num_moe_layers} layers" if model.moe_layers else "dense"
    served = f"model {config.router.model_name}: {experts}, {footprint.dtype}"
    ranks = f"{config.serve.ranks} rank{'s' if config.serve.ranks != 1 else ''}"
    lines = [
        f"{served}; {_bytes(footprint.checkpoint_bytes)} in {config.engine.model_dir}",
        f"{ranks} on {where}; nothing was started",
    ]
    if footprint.is_shared:
        lines.append(
            f"each host packs the checkpoint once ({_bytes(footprint.pack_bytes)} on its disk); ranks map that"
        )
    return lines


def host_table(found: Plan, footprint: Footprint) -> Table:
    """A line a host."""
    table = Table(
        "host", "name", "ranks", "claimed", "weights mapped" if footprint.is_shared else "weights", "KV pools"
    )
    request = found.request
    by_address = {host.address: host for host in found.hosts}
    for address, ranks in found.ranks_by_host.items():
        host, held = by_address[address], footprint.host(address)
        claims = [f"{request.cpus * len(ranks):g} of {host.cpus:g} free CPUs"]
        if request.gpus:
            claims.append(f"{request.gpus * len(ranks):g} of {host.gpus:g} free GPUs {host.accelerator}".rstrip())
        name = f"{host.hostname} (Ray's head)" if host.is_head and host.node_id else host.hostname
        table.add_row(address, name, runs(ranks), ", ".join(claims), _bytes(held.weights_bytes), _bytes(held.kv_bytes))
    return table


def rank_table(found: Plan, footprint: Footprint) -> Table:
    """A line a rank."""
    table = Table("rank", "host", "device", "experts of a layer", "weights", "KV pools")
    device = "GPU" if found.request.gpus else "CPU"
    for rank, address in enumerate(found.addresses):
        held = footprint.rank(rank)
        weights, pools = _bytes(held.weights_bytes), _bytes(held.kv_bytes)
        table.add_row(str(rank), address, device, held.experts, weights, pools)
    return table


def port_table(config: ServeConfig, hosts: list[HostOffer], found: Plan) -> Table:
    """Which TCP ports listen where."""
    network, serve = config.network, config.serve
    head = next((host.address for host in hosts if host.is_head), "Ray's head")
    interface = f" ({network.interface})" if network.interface else ""
    each = f"each host{interface}" if serve.ray_address else OWN_HOST
    rows = [
        ("gRPC", serve.host, str(serve.grpc_port)),
        ("HTTP", serve.host, str(serve.http_port)),
        ("metrics", serve.host, str(serve.metrics_port)),
        ("leader", head + interface, network.leader_ports),
    ]
    if serve.ray_address:
        rows.append(("metrics", each, str(serve.metrics_port)))
        rows.append(("host agent", each, network.agent_ports))
    rows.append(("rank", each, network.rank_ports))
    if serve.ranks > 1:
        rows.append(("rendezvous store", head + interface, network.store_ports))
    if len(found.ranks_by_host) > 1:
        rows.append(("exchange", each, network.exchange_ports))
    table = Table("port of", "address", "TCP port")
    for what, where, ports in rows:
        table.add_row(what, where, "any that is free" if ports is None else str(ports))
    return table


def _bytes(count: int) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count / 1e6:.1f} MB"
