"""Addresses HOST:PORT, ranges of TCP ports that a firewall lets through, and the first that is free. No torch here."""

import errno
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from workers.errors import UserError


@dataclass(frozen=True)
class PortRange:
    """TCP ports `first` to `last`, both included.

    Raises:
        UserError: one is no port, or the last is below the first.
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last <= 65535:
            raise UserError(f"{self} is no range of ports; write FIRST-LAST, from 1 to 65535, such as 20000-20099")

    @classmethod
    def parse(cls, text: str) -> "PortRange":
        """From "FIRST-LAST", or "PORT" for a range of one.

        Raises:
            UserError: it is neither.
        """
        found = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", text)
        if found is None:
            raise UserError(f"{text!r} is no range of ports; write FIRST-LAST, from 1 to 65535, such as 20000-20099")
        return cls(int(found[1]), int(found[2] or found[1]))

    def overlaps(self, other: "PortRange") -> bool:
        return self.first <= other.last and other.first <= self.last

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last + 1))

    def __contains__(self, port: object) -> bool:
        return isinstance(port, int) and self.first <= port <= self.last

    def __str__(self) -> str:
        return f"{self.first}-{self.last}" if self.first != self.last else str(self.first)


def bind_port(ports: PortRange | None, host: str, name: str) -> socket.socket:
    """A socket that listens on the first free port of a range.

    Args:
        ports: None: any port the system chooses.
        host: an address of this machine, an IPv6 one with or without brackets.
        name: what the range is called in the configuration, for the error.

    Raises:
        UserError: no port of the range is free, or `host` is no address of this machine.
    """
    for port in ports or (0,):
        try:
            return _listen(host, port)
        except (OSError, UnicodeError) as error:
            _explain(error, host, port, name)
    raise UserError(_none_free(ports, host, name))


def serve_on(ports: PortRange | None, host: str, name: str, bind: Callable[[int], int]) -> int:
    """As `bind_port`, where somebody else listens, such as a gRPC server (with the option grpc.so_reuseport 0: or two
    would share a port and each get half of what comes).

    Args:
        bind: listens on a port and returns it; 0 is any. Raises OSError or RuntimeError where it cannot.

    Returns:
        The port.

    Raises:
        UserError: as `bind_port`.
    """
    if ports is None:
        return bind(0)
    for port in ports:
        try:
            # Else a gRPC server that fails says so on stderr, at length.
            _listen(host, port).close()
            return bind(port)
        except (OSError, UnicodeError) as error:
            _explain(error, host, port, name)
        except RuntimeError:
            # Somebody was quicker.
            continue
    raise UserError(_none_free(ports, host, name))


def join_address(host: str, port: int) -> str:
    """HOST:PORT, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """Host without brackets, and port, of HOST:PORT.

    Raises:
        UserError: it is none.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"{address!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    made = socket.socket(family, kind, protocol)
    try:
        # A server that ended a moment ago leaves its port in TIME_WAIT, which is no obstacle.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        # Not before this is the port this socket's alone.
        made.listen(socket.SOMAXCONN)
    except OSError:
        made.close()
        raise
    return made


def _explain(error: OSError | UnicodeError, host: str, port: int, name: str) -> None:
    """Nothing where the next port may be free; else raises what the user can mend."""
    if isinstance(error, (socket.gaierror, UnicodeError)) or error.errno == errno.EADDRNOTAVAIL:
        raise UserError(f"{host} is no address of this host") from None
    if error.errno != errno.EADDRINUSE:
        raise UserError(f"{name}: cannot listen on port {port} of {host} ({error.strerror}); give others") from None


def _none_free(ports: PortRange | None, host: str, name: str) -> str:
    if ports is None:
        return f"{name}: the system has no free port of {host}"
    if len(ports) == 1:
        return f"port {ports} of {host} is in use; end what listens there, or widen {name}"
    return f"no free port in {ports} of {host}; widen {name}"
