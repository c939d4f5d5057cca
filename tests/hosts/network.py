"""Several hosts on one machine, joined by a bridge: real to the programs in them, no part of the machine's network."""

import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.hosts.cell import Cell, HostsError, Sizes
from tests.hosts.delay import DelayLine, set_netem
from tests.hosts.host import INTERFACE, Host
from tests.hosts.requirements import why_not

SUBNET = IPv4Network("10.77.0.0/24")
MOST_HOSTS = 64
CLIENT = 100
WALL = 254
BRIDGE = "br0"
# Where a kernel shows bridged packets to the filter too, those between hosts pass.
_WALL = """table ip wall {
  set seen { type ipv4_addr . inet_proto . ipv4_addr . inet_service; flags dynamic; size 65535; }
  chain before {
    type filter hook prerouting priority 0;
    ip daddr SUBNET accept
    meta l4proto { tcp, udp } add @seen { ip saddr . meta l4proto . ip daddr . th dport }
    drop
  }
}
"""


class HostNetwork:
    """A network with hosts on it, for a `with` block. At its end, or when this process ends anyhow, all is gone.

    Hosts are called host1, host2, … with addresses .1, .2, …, and resolve each other's names. They reach each other and
    nothing else. The network is silent about what is cut or gone: no reset, no "unreachable".

    Args:
        size: hosts at first.
        client: one more host, `client`, with address .100.
        outside: a way out, which ends at a wall: what hosts send to elsewhere is lost, and `outside_attempts` names it.
            Without it their kernel tells them at once that there is no way.
        sizes: of each host's own file systems.
        shared: files or folders below /tmp or /dev/shm that hosts shall see too; the machine's others they see anyway.
        subnet: a /24 or wider.

    Raises:
        HostsError: on entry, where this machine has not got what it takes.
    """

    def __init__(
        self,
        size: int = 4,
        *,
        client: bool = False,
        outside: bool = False,
        sizes: Sizes | None = None,
        shared: Sequence[Path] = (),
        subnet: IPv4Network = SUBNET,
    ) -> None:
        self.size, self.has_client, self.has_outside = size, client, outside
        self.sizes, self.shared, self.subnet = sizes or Sizes(), tuple(shared), subnet
        self.hosts: list[Host] = []
        """Those that are up, in the order of their addresses."""
        self._client: Host | None = None
        self._cells: list[Cell] = []
        self._lines: dict[Host, DelayLine] = {}
        self._cut: set[Host] = set()
        self._has_netem: bool | None = None
        self._last = 0
        self._fabric = Cell("fabric")

    def __enter__(self) -> Self:
        if reason := why_not():
            raise HostsError(f"hosts cannot be made on this machine: {reason}")
        try:
            self._begin(self._fabric)
            hosts = [self._plan() for _ in range(self.size)]
            if self.has_client:
                self._client = self._plan(CLIENT, "client")
            joined = [*hosts, self._client] if self._client else hosts
            for host in joined:
                self._begin(host)
            self._fabric.wait()
            self._ip(
                "link set lo up",
                f"link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
                f"link set {BRIDGE} addrgenmode none",
                f"link set {BRIDGE} up",
            )
            if self.has_outside:
                self._ip(f"link set {BRIDGE} address {_mac(WALL)}", f"addr add {self._address(WALL)} dev {BRIDGE}")
                self._nft("-f", "-", rules=_WALL.replace("SUBNET", str(self.subnet)))
            self._join(joined)
            self.hosts = hosts
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def __getitem__(self, index: int) -> Host:
        return self.hosts[index]

    @property
    def client(self) -> Host:
        """The host that is none of the cluster's."""
        if self._client is None:
            raise HostsError("this network has no client: HostNetwork(..., client=True)")
        return self._client

    def add(self, *, hostname: str = "", sizes: Sizes | None = None) -> Host:
        """One more host, with the next address."""
        host = self._plan(hostname=hostname, sizes=sizes)
        self._begin(host)
        self._join([host])
        self.hosts.append(host)
        return host

    def remove(self, host: Host) -> None:
        """As if its power went: no more frames from it, all its processes are gone, its files too."""
        if not host.is_up:
            return
        # The cable first: the kernel would say goodbye on behalf of processes that it ends.
        self._ip(f"link del {_port(host)}")
        host.kill()
        self._cells.remove(host)
        self._cut.discard(host)
        if host in self._lines:
            self._lines.pop(host).close()
        if host in self.hosts:
            self.hosts.remove(host)

    def cut(self, host: Host) -> None:
        """From now on frames from and to it are lost, and nobody is told. Its interface stays up."""
        self._ip(f"link set {self._uplink(host)} nomaster")
        self._cut.add(host)

    def heal(self, host: Host) -> None:
        """Undo `cut`."""
        self._ip(f"link set {self._uplink(host)} master {BRIDGE}")
        self._cut.discard(host)

    def flap(self, host: Host, times: int, cut_s: float, healed_s: float) -> None:
        """Cut and heal it so often, each lasting so long; at the end it is healed."""
        for _ in range(times):
            self.cut(host)
            time.sleep(cut_s)
            self.heal(host)
            time.sleep(healed_s)

    def delay(self, host: Host, ms: float, *, loss: float = 0.0) -> str:
        """Frames that leave the host arrive `ms` later, and a share `loss` of them not at all; 0 and 0 undo it. A round
        trip between two hosts takes what both of them add.

        Returns:
            By what: `netem`, the kernel's, or, where it has none, `delay line`, a process of ours that copies frames.
        """
        if ms < 0 or not 0 <= loss <= 1:
            raise HostsError(f"a delay of {ms} ms with a loss of {loss} cannot be: at least 0, and from 0 to 1")
        if self._has_netem is None:
            self._has_netem = set_netem(host, 1e-6, 0.0)
        if self._has_netem:
            set_netem(host, ms / 1000, loss)
            return "netem"
        reconnect = self.cut if host in self._cut else self.heal
        if not ms and not loss:
            if host in self._lines:
                self._lines.pop(host).close()
                reconnect(host)
            return "delay line"
        if host not in self._lines:
            self._lines[host] = DelayLine(self._fabric, _port(host))
            reconnect(host)
        self._lines[host].set(ms / 1000, loss)
        return "delay line"

    def outside_attempts(self) -> list[str]:
        """`SOURCE PROTOCOL DESTINATION:PORT` of what hosts sent to elsewhere so far, each once.

        Raises:
            HostsError: the network has no outside.
        """
        if not self.has_outside:
            raise HostsError("this network has no outside: HostNetwork(..., outside=True)")
        tables = json.loads(self._nft("-j", "list", "set", "ip", "wall", "seen"))["nftables"]
        elements = next(one["set"].get("elem", []) for one in tables if "set" in one)
        words = sorted(element["concat"] for element in elements)
        return [f"{source} {protocol} {destination}:{port}" for source, protocol, destination, port in words]

    def close(self) -> None:
        """End all of it."""
        for cell in self._cells:
            cell.signal_kill()
        cells, self._cells = self._cells, []
        self.hosts, self._client = [], None
        for cell in cells:
            cell.kill()
        while self._lines:
            self._lines.popitem()[1].close()

    def _plan(self, index: int = 0, hostname: str = "", sizes: Sizes | None = None) -> Host:
        if not index:
            self._last += 1
            index = self._last
        if index > MOST_HOSTS and index != CLIENT:
            raise HostsError(f"a network has room for {MOST_HOSTS} hosts")
        return Host(
            hostname or f"host{index}",
            sizes or self.sizes,
            self.shared,
            self._names(),
            index=index,
            interface_address=self._address(index),
        )

    def _begin(self, cell: Cell) -> None:
        self._cells.append(cell)
        cell.begin()

    def _join(self, hosts: Sequence[Host]) -> None:
        for host in hosts:
            host.wait()
        with ExitStack() as stack:
            lines, opened = [], []
            for host in hosts:
                # By its file: `ip` runs in the fabric, where this host's process id means nothing.
                namespace = os.open(f"/proc/{host.pid}/ns/net", os.O_RDONLY)
                stack.callback(os.close, namespace)
                opened.append(namespace)
                peer = f"name {INTERFACE} address {_mac(host.index)} netns /proc/self/fd/{namespace}"
                lines += [
                    f"link add {_port(host)} type veth peer {peer}",
                    f"link set {_port(host)} addrgenmode none master {BRIDGE}",
                    f"link set {_port(host)} up",
                ]
            self._ip(*lines, pass_fds=tuple(opened))
        # Fixed neighbours: one that is gone must not be found missing by who asks for its hardware address.
        indexes = [*range(1, MOST_HOSTS + 1), CLIENT, WALL]
        neighbours = {
            index: f"neigh add {self._address(index).ip} lladdr {_mac(index)} dev {INTERFACE} nud permanent"
            for index in indexes
        }
        begun = [
            host.begin_ip(
                "link set lo up",
                f"link set {INTERFACE} addrgenmode none",
                f"addr add {host.interface_address} brd + dev {INTERFACE}",
                f"link set {INTERFACE} up",
                *(line for index, line in neighbours.items() if index != host.index),
                *([f"route add default via {self._address(WALL).ip}"] if self.has_outside else []),
            )
            for host in hosts
        ]
        for host, process in zip(hosts, begun, strict=True):
            host.wait_ip(process)

    def _ip(self, *lines: str, pass_fds: tuple[int, ...] = ()) -> None:
        self._fabric.ip(*lines, pass_fds=pass_fds)

    def _nft(self, *arguments: str, rules: str | None = None) -> str:
        try:
            return self._fabric.run(["nft", *arguments], input=rules, check=True, timeout=20).stdout
        except FileNotFoundError:
            raise HostsError("for an outside the program `nft` is needed: apt-get install nftables") from None

    def _uplink(self, host: Host) -> str:
        return self._lines[host].uplink if host in self._lines else _port(host)

    def _address(self, index: int) -> IPv4Interface:
        return IPv4Interface((self.subnet.network_address + index, self.subnet.prefixlen))

    def _names(self) -> str:
        lines = ["127.0.0.1 localhost"]
        lines += [f"{self._address(index).ip} host{index}" for index in range(1, MOST_HOSTS + 1)]
        return "\n".join([*lines, f"{self._address(CLIENT).ip} client", ""])


def _port(host: Host) -> str:
    return f"port{host.index}"


def _mac(index: int) -> str:
    return f"02:ca:7a:00:00:{index:02x}"
