"""TCP ports of this machine: which are free, and saying so before anything is started."""

import errno
import random
import socket
from pathlib import Path

from cluster.errors import UsageError

LOWEST_FREE_PORT = 10_000
TRIED_FREE_PORTS = 1000


def check_port(host: str, port: int, flag: str) -> None:
    """Can a server listen there?

    Raises:
        UsageError: no; the sentence names the address and the command-line flag.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # A server that ended a moment ago leaves its port in TIME_WAIT, which is no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except socket.gaierror:
        raise UsageError(
            f"host: {host!r} is no address of this machine; use one such as 127.0.0.1 or 0.0.0.0"
        ) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"{flag}: port {port} of {host} is in use; end what listens there or give another"
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise UsageError(f"host: {host} is no address of this machine") from None
        raise UsageError(f"{flag}: cannot listen on {host}:{port} ({error.strerror}); give another port") from None


def check_listens(address: str, flag: str, timeout_s: float = 5.0) -> None:
    """Does anything listen at HOST:PORT?

    Raises:
        UsageError: no, or that is no address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"{flag}: must be HOST:PORT or auto, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "no answer"
        raise UsageError(f"{flag}: nothing can be reached at {address} ({reason}); is that Ray running?") from None


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports that were free a moment ago, all different. None of those that the system chooses by itself, if there are
    others: such a one is soon taken by somebody's outgoing connection."""
    candidates = list(range(LOWEST_FREE_PORT, _lowest_chosen_port()))
    random.shuffle(candidates)
    probes: list[socket.socket] = []
    try:
        for port in (*candidates[:TRIED_FREE_PORTS], *[0] * count):
            if len(probes) == count:
                break
            probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            try:
                probe.bind((host, port))
            except OSError:
                probe.close()
            else:
                probes.append(probe)
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _lowest_chosen_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768
