"""Distance between hosts: frames that leave a host arrive later, or not at all."""

import select
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.hosts.cell import Cell, CellProcess, HostsError
from tests.hosts.host import Host

PROGRAM = Path(__file__).with_name("delay_line.py")
TUN = Path("/dev/net/tun")
READY_BOUND_S = 20.0


def set_netem(host: Host, seconds: float, loss: float) -> bool:
    """By the kernel itself, on the host's own interface; False where the kernel has no netem."""
    if not seconds and not loss:
        host.run(["tc", "qdisc", "del", "dev", host.interface, "root"], timeout=20)
        return True
    netem = ["netem", "limit", "100000", "delay", f"{seconds * 1e6:.0f}us", "loss", f"{loss * 100:.6f}%"]
    try:
        done = host.run(["tc", "qdisc", "replace", "dev", host.interface, "root", *netem], timeout=20)
    except FileNotFoundError:
        return False
    if done.returncode and "unknown" not in done.stderr and "No such file" not in done.stderr:
        raise HostsError(f"{host}: no delay could be set: {done.stderr.strip()}")
    return not done.returncode


@dataclass
class DelayLine:
    """A process in the fabric through which all frames from and to a host go, between its port and the bridge.

    It adds what it takes to copy a frame twice (some tens of microseconds), and its own load on the machine's cores.

    Args:
        fabric: where the port is.
        port: the host's. It is taken off its bridge, where `uplink` is to stand for it.
    """

    fabric: Cell
    port: str
    _process: CellProcess = field(init=False)

    def __post_init__(self) -> None:
        if not TUN.exists():
            raise HostsError(f"no delay between hosts: the kernel has no netem, and there is no {TUN} to do without")
        near, own = f"near-{self.port}", f"br-{self.port}"
        self._process = self.fabric.popen(
            [sys.executable, "-ISs", PROGRAM, near, self.uplink],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        output = self._process.stdout
        assert output is not None
        ready, _, _ = select.select([output], [], [], READY_BOUND_S)
        line = output.readline() if ready else f"it said nothing for {READY_BOUND_S:.0f} s"
        if line != "ready\n":
            self._process.kill()
            raise HostsError(f"no delay line for {self.port}: {line}{output.read()}")
        self.fabric.ip(
            f"link add {own} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
            *(f"link set {name} addrgenmode none" for name in (own, near, self.uplink)),
            *(f"link set {name} up" for name in (own, near, self.uplink)),
            f"link set {near} master {own}",
            f"link set {self.port} master {own}",
        )

    @property
    def uplink(self) -> str:
        """The device that stands on the bridge in the port's place."""
        return f"far-{self.port}"

    def set(self, seconds: float, loss: float) -> None:
        """For frames that leave the host from now on."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds:.9f} {loss:.9f}\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """The devices go with the process. The port is left on no bridge."""
        self._process.kill()
        with self._process:
            pass
        if self.fabric.pid:
            self.fabric.ip(f"link del br-{self.port}")
