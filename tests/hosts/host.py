"""A host: a cell with an address on the network of a harness."""

import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Interface

import psutil

from tests.hosts.cell import Cell, HostsError

FREEZE_BOUND_S = 10.0
INTERFACE = "eth0"


@dataclass(eq=False)
class Host(Cell):
    """Made by a `HostNetwork`, which also cuts, heals and removes it.

    Args:
        index: last number of its address.
        interface_address: with the length of the network's prefix.
    """

    index: int = 0
    interface_address: IPv4Interface = field(default_factory=lambda: IPv4Interface("0.0.0.0/0"))
    interface: str = INTERFACE
    _stopped: list[psutil.Process] | None = field(init=False, default=None, repr=False)

    @property
    def address(self) -> str:
        return str(self.interface_address.ip)

    @property
    def is_up(self) -> bool:
        return bool(self.pid)

    @property
    def is_frozen(self) -> bool:
        return self._stopped is not None

    def __str__(self) -> str:
        return f"{self.hostname} ({self.address})"

    def freeze(self) -> None:
        """Stop every process. The kernel still answers for the host (acknowledges segments, accepts connections); a
        machine that stands still wholly is frozen and cut.

        Raises:
            HostsError: a process could not be stopped (it sleeps in the kernel, uninterruptibly).
        """
        if self._stopped is not None:
            return
        # SIGSTOP rather than a freezer: a frozen group of version 1 does not even die, and its folder would outlive us.
        self._stopped = []
        deadline = time.monotonic() + FREEZE_BOUND_S
        # Twice nothing left to stop: a process that was being forked meanwhile is seen by the second look.
        quiet = 0
        while quiet < 2:
            running = [one for one in self.processes() if not _is_stopped(one)]
            for process in running:
                if process not in self._stopped:
                    self._stopped.append(process)
                _signal(process, signal.SIGSTOP)
            quiet = 0 if running else quiet + 1
            if running and time.monotonic() > deadline:
                raise HostsError(f"{self}: {running} did not stop within {FREEZE_BOUND_S:.0f} s")
            if running:
                time.sleep(0.001)

    def thaw(self) -> None:
        """Let go on what `freeze` stopped, and only that."""
        stopped, self._stopped = self._stopped or [], None
        for process in stopped:
            _signal(process, signal.SIGCONT)

    def block_ports(self, ports: Iterable[int | tuple[int, int]]) -> None:
        """Drop, without a word, TCP segments from other hosts to these ports or ranges (both ends included)."""
        elements = ", ".join(str(one) if isinstance(one, int) else f"{one[0]}-{one[1]}" for one in ports)
        self._nft(
            "table ip harness { chain blocked { type filter hook input priority 0; "
            f'iifname "{self.interface}" tcp dport {{ {elements} }} drop; }}; }}'
        )

    def unblock_ports(self) -> None:
        """Undo every `block_ports`."""
        self._nft("table ip harness {}\ndelete table ip harness")

    def add_interface(self, name: str, address: str) -> None:
        """Another interface with an address (`A.B.C.D/LENGTH`), which leads nowhere: nobody is at its other end."""
        self.ip(
            f"link add {name} type veth peer name {name}-end",
            f"link set {name}-end up",
            f"addr add {address} dev {name}",
            f"link set {name} up",
        )

    def add_address(self, address: str) -> None:
        """Another address on its interface, perhaps another host's."""
        self.ip(f"addr add {address}/32 dev {self.interface}")

    def _nft(self, rules: str) -> None:
        try:
            self.run(["nft", "-f", "-"], input=rules, check=True, timeout=20)
        except FileNotFoundError:
            raise HostsError("to block ports the program `nft` is needed: apt-get install nftables") from None


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass
