"""Addresses, interfaces and ports of a gang's processes: table [network] of a configuration file, and what is there."""

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import psutil

from workers.errors import UserError
from workers.ports import PortRange, bind_port, join_address, serve_on, split_address

__all__ = [
    "NetworkConfig",
    "PortRange",
    "address_of",
    "bind_port",
    "interface_of",
    "interfaces",
    "join_address",
    "route_address",
    "serve_on",
    "split_address",
]

RANGES = ("rank_ports", "exchange_ports", "store_ports", "agent_ports")


@dataclass(frozen=True)
class NetworkConfig:
    """Table [network]: by which addresses and ports the processes of a gang reach each other. The same on every host.

    Ports are TCP; where none are given, the system chooses among its ephemeral ones. Servers listen on their host's
    address in the cluster alone.

    Raises:
        UserError: a value is out of its range, or two ranges overlap.
    """

    interface: str = ""
    """Network interface between the hosts, such as "eth1", by the same name on each; empty: the one whose address Ray
    knows the host by."""
    leader_port: int = 0
    """Of the gang's leader, on the host of Ray's head: ranks hold a lifeline to it, routers watch it. 0: any."""
    rank_ports: PortRange | None = None
    """Of ranks, one each: routers send sequences there, peers wake each other. "FIRST-LAST"; none given: any."""
    exchange_ports: PortRange | None = None
    """Of ranks, one each: rows of other hosts' ranks come in there."""
    store_ports: PortRange | None = None
    """Of rendezvous stores on the leader's host, one an epoch; two overlap, so two ports or more."""
    agent_ports: PortRange | None = None
    """Of host agents, one a host: other hosts' agents try whether they reach it, and how fast."""

    def __post_init__(self) -> None:
        if not 0 <= self.leader_port <= 65535:
            raise UserError(f"leader_port: must be a port from 1 to 65535, or 0 for any; got {self.leader_port}")
        if self.store_ports is not None and len(self.store_ports) < 2:
            raise UserError(f"store_ports: {self.store_ports} is one port, and a new epoch's store overlaps the last's")
        for (name, ports), (other, others) in combinations(self.fixed_ports().items(), 2):
            if ports.overlaps(others):
                raise UserError(f"{other}: {others} overlaps {name} ({ports}); give each ports of its own")

    @property
    def leader_ports(self) -> PortRange | None:
        """`leader_port` as a range."""
        return PortRange(self.leader_port, self.leader_port) if self.leader_port else None

    def fixed_ports(self) -> dict[str, PortRange]:
        """Every port that is not the system's to choose, by the key that gives it."""
        named = {"leader_port": self.leader_ports} | {name: getattr(self, name) for name in RANGES}
        return {name: ports for name, ports in named.items() if ports is not None}

    def check_apart(self, others: Mapping[str, int]) -> None:
        """Raises UserError where a port of `others`, by name, lies in one of the ranges."""
        for other, port in others.items():
            for name, ports in self.fixed_ports().items():
                if port in ports:
                    raise UserError(f"{name}: {ports} contains {port}, which is the {other} port; give others")

    def check_room(self, ranks_on_host: int, host: str = "a host") -> None:
        """Raises UserError where a host's ranks are more than a range has ports."""
        for name in ("rank_ports", "exchange_ports"):
            ports: PortRange | None = getattr(self, name)
            if ports is not None and len(ports) < ranks_on_host:
                has = "1 port" if len(ports) == 1 else f"{len(ports)} ports"
                raise UserError(f"{name}: {ports} has {has}, and {host} has {ranks_on_host} ranks; widen it")


def interfaces() -> dict[str, list[str]]:
    """Addresses of this host by network interface, IPv4 before IPv6. Link-local IPv6 ones mean nothing without their
    interface and are left out, and so are interfaces without any other."""
    found: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        for family in (socket.AF_INET, socket.AF_INET6):
            addresses = [entry.address.partition("%")[0] for entry in entries if entry.family == family]
            usable = [
                each for each in addresses if not ipaddress.ip_address(each).is_link_local or family == socket.AF_INET
            ]
            if usable:
                found.setdefault(name, []).extend(usable)
    return found


def address_of(interface: str) -> str:
    """This host's first address on `interface`.

    Raises:
        UserError: there is no such interface, or it has no address.
    """
    found = interfaces()
    if interface in found:
        return found[interface][0]
    if interface in psutil.net_if_addrs():
        raise UserError(f"interface: {interface} of {socket.gethostname()} has no address")
    has = ", ".join(f"{name} ({addresses[0]})" for name, addresses in found.items()) or "none"
    raise UserError(f"interface: {socket.gethostname()} has no {interface!r}; its interfaces are {has}")


def interface_of(address: str) -> str:
    """Name of this host's interface that has `address`.

    Raises:
        UserError: none has.
    """
    wanted = ipaddress.ip_address(address.strip("[]"))
    found = interfaces()
    for name, addresses in found.items():
        if any(ipaddress.ip_address(each) == wanted for each in addresses):
            return name
    if wanted.is_loopback:
        # All of 127.0.0.0/8 is there, though only one address of it is listed.
        for name, addresses in found.items():
            if any(ipaddress.ip_address(each).is_loopback for each in addresses):
                return name
    has = ", ".join(f"{each} ({name})" for name, addresses in found.items() for each in addresses)
    raise UserError(f"{address} is no address of {socket.gethostname()}; it has {has}")


def route_address(to: str) -> str:
    """This host's address on the way to `to` (a host, or HOST:PORT), which need not answer: nothing is sent.

    Raises:
        UserError: there is no way, or `to` is no host.
    """
    host, port = split_address(to) if _has_port(to) else (to.strip("[]"), 1)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except (socket.gaierror, UnicodeError):
        raise UserError(f"{host} is the name of no host") from None
    except OSError as error:
        raise UserError(f"{socket.gethostname()} has no route to {host} ({error.strerror})") from None


def _has_port(to: str) -> bool:
    return to.count(":") == 1 or "]:" in to
