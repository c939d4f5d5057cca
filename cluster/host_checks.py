"""What must be true of a gang's hosts before ranks start on them: found out within bounds, and named when it is not.

Runs in the leader. A sentence says which host lacks what, and what to do.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence

from cluster.host import FREE_BYTES, Host, HostGoneError
from workers.errors import UserError
from workers.ports import join_address, split_address

MODEL_POLL_S = 0.2
_SHOWN = 4


async def check_facts(hosts: Sequence[Host], versions: Mapping[str, str], bound_s: float) -> None:
    """Ask every host who it is.

    Args:
        versions: the leader's own, which every host must have.
        bound_s: for all of them, their agents' start included.

    Raises:
        UserError: an address twice, another version, a full disk, or what a host found wrong itself.
        HostGoneError: a host did not answer in time.
    """

    async def ask(host: Host) -> None:
        host.facts = await host.call("facts")

    await _each(hosts, ask, bound_s, "its agent has not started")
    facts = {host.name: host.facts for host in hosts if host.facts is not None}
    _check_addresses(hosts)
    for name, found in facts.items():
        for package, wanted in versions.items():
            if (has := found.versions.get(package, "missing")) != wanted:
                raise UserError(
                    f"host {name} has {package} {has}, the gang's leader {wanted}; install the same on every host"
                )
        if found.free_bytes < FREE_BYTES:
            raise UserError(
                f"host {name}: {found.temporary_folder} has {found.free_bytes / 1e6:.0f} MB free, and logs and metrics "
                f"need {FREE_BYTES / 1e6:.0f} MB; make room there"
            )


def _check_addresses(hosts: Sequence[Host]) -> None:
    for address, count in Counter(host.address for host in hosts).items():
        if count > 1:
            names = " and ".join(host.facts.hostname for host in hosts if host.address == address and host.facts)
            raise UserError(f"hosts {names} have the same address {address}; give each its own")


async def check_network(hosts: Sequence[Host], ranks: Mapping[str, int], leader_address: str, bound_s: float) -> None:
    """Try every port that ranks will use, from every host to every other one, and the leader's from all.

    Args:
        ranks: number of ranks by host address.
        bound_s: for all of it.

    Raises:
        UserError: one is not reached, or none is free.
        HostGoneError: a host did not answer in time.
    """
    ports: dict[str, list[int]] = {}
    failed: dict[str, dict[str, str]] = {}

    async def open_ports(host: Host) -> None:
        ports[host.address] = await host.call("open_ports", ranks.get(host.address, 0))
        host.agent_port = ports[host.address][0]

    async def try_ports(host: Host) -> None:
        others = [
            join_address(address, port) for address, found in ports.items() if address != host.address for port in found
        ]
        failed[host.address] = await host.call("unreachable", [leader_address, *others])

    async def close_ports(host: Host) -> None:
        await host.call("close_ports")

    await _each(hosts, open_ports, bound_s, "it has not opened its ports")
    await _each(hosts, try_ports, bound_s, "it has not tried the others' ports")
    await _each(hosts, close_ports, bound_s, "it has not closed its ports")
    if any(failed.values()):
        raise UserError(_unreached(hosts, failed, leader_address))


def _unreached(hosts: Sequence[Host], failed: Mapping[str, Mapping[str, str]], leader_address: str) -> str:
    """One sentence from what each host (by address) does not reach: a host that reaches nobody explains itself; else
    the host of which most is not reached is at fault."""
    names = {host.address: host.name for host in hosts}
    lonely = [
        address
        for address, targets in failed.items()
        if {_host(target) for target in targets} >= names.keys() - {address}
    ]
    if len(lonely) == 1 and len(hosts) > 2:
        reason = next(iter(failed[lonely[0]].values()))
        return (
            f"host {names[lonely[0]]} reaches none of the others ({reason}); check its interface and routes, or set "
            "[network] interface"
        )
    sources_of: dict[str, list[str]] = {}
    for address, targets in failed.items():
        for target in targets:
            sources_of.setdefault(target, []).append(address)
    complaints = Counter(_host(target) for target, sources in sources_of.items() for _ in sources)
    ((worst, _),) = complaints.most_common(1)
    unreached = sorted((target for target in sources_of if _host(target) == worst), key=_port)
    sources = sorted({source for target in unreached for source in sources_of[target]})
    reason = failed[sources_of[unreached[0]][0]][unreached[0]]
    ports = ", ".join(str(_port(target)) for target in unreached[:_SHOWN]) + (", …" if len(unreached) > _SHOWN else "")
    what = "the leader at " if unreached == [leader_address] else ""
    return (
        f"{what}host {names.get(worst, worst)}, port {ports} is not reached from {_named(sources, names)} ({reason}); "
        "open it in the firewall, see deploy/network.md"
    )


def _named(addresses: Sequence[str], names: Mapping[str, str]) -> str:
    shown = ", ".join(names.get(address, address) for address in addresses[:_SHOWN])
    more = f" and {len(addresses) - _SHOWN} more" if len(addresses) > _SHOWN else ""
    return f"{'host' if len(addresses) == 1 else 'hosts'} {shown}{more}"


def _host(address: str) -> str:
    return split_address(address)[0]


def _port(address: str) -> int:
    return split_address(address)[1]


async def check_model(hosts: Sequence[Host], stall_s: float, changed: Callable[[], None]) -> None:
    """Have the same checkpoint on every host; `Host.model_dir` is where.

    Args:
        stall_s: from the last byte that any host fetched.
        changed: called when some have been fetched.

    Raises:
        UserError: it cannot be had on a host, or is another one there.
        HostGoneError: a host did not answer in time.
    """
    done, deadline = -1, time.monotonic() + stall_s

    async def ask(host: Host) -> None:
        host.model_state = await host.call("model")

    while True:
        await _each(hosts, ask, stall_s, "it has not looked for the checkpoint")
        for host in hosts:
            if host.model_state.error:
                raise UserError(
                    f"host {host.name}: {host.model_state.error}; copy the checkpoint there, or name a folder that all "
                    "hosts share, or a repository (hf://ORG/NAME)"
                )
        if (now := sum(host.model_state.bytes_done for host in hosts)) > done:
            done, deadline = now, time.monotonic() + stall_s
            changed()
        if not (lacking := [host.name for host in hosts if host.model_state.folder is None]):
            break
        if time.monotonic() > deadline:
            raise HostGoneError(f"host {lacking[0]} has not got the checkpoint: nothing came for {stall_s:g} s")
        await asyncio.sleep(MODEL_POLL_S)
    _check_fingerprints(hosts)
    for host in hosts:
        host.model_dir = host.model_state.folder


def _check_fingerprints(hosts: Sequence[Host]) -> None:
    counts = Counter(host.model_state.fingerprint for host in hosts)
    if len(counts) == 1:
        return
    (common, _), *_ = counts.most_common()
    other = next(host for host in hosts if host.model_state.fingerprint != common)
    most = next(host for host in hosts if host.model_state.fingerprint == common)
    raise UserError(
        f"host {other.name} has another checkpoint at {other.model_state.folder} than host {most.name} (fingerprint "
        f"{other.model_state.fingerprint[:12]}, not {common[:12]}); copy it there anew"
    )


async def measure_round_trips(hosts: Sequence[Host]) -> None:
    """Every host to every other one, once more. A host that does not answer keeps what it had."""

    async def ask(host: Host) -> None:
        others = {each.address: join_address(each.address, each.agent_port) for each in hosts if each is not host}
        host.round_trips = await host.call("round_trips", others)

    await asyncio.gather(*(ask(host) for host in hosts), return_exceptions=True)


async def _each(hosts: Sequence[Host], action: Callable[[Host], Awaitable[None]], bound_s: float, lacks: str) -> None:
    async def bounded(host: Host) -> None:
        try:
            async with asyncio.timeout(bound_s):
                await action(host)
        except TimeoutError:
            raise HostGoneError(f"host {host.name}: {lacks} within {bound_s:g} s") from None

    results = await asyncio.gather(*(bounded(host) for host in hosts), return_exceptions=True)
    # A host that is gone explains what others complain of.
    for error in sorted(filter(None, results), key=lambda each: not isinstance(each, HostGoneError)):
        raise error
