"""Is a host reached from another, and how long does the way there and back take: a port that echoes, and a call to it.

What is probed are TCP ports, since those are what ranks use: a ping may pass where they do not, and the reverse.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

PROBE_TIMEOUT_S = 3.0
_IDLE_S = 30.0
_MESSAGE = b"caravan?"


class EchoPort:
    """Echoes on one port of `host` until `close`, one small message a connection at a time.

    Args:
        listener: a bound socket; it listens from here on.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._connections: set[socket.socket] = set()
        self.port = int(listener.getsockname()[1])
        listener.listen(64)
        self._thread = threading.Thread(target=self._accept, name="echo-port", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Whoever is connected is cut off."""
        for each in (self._listener, *list(self._connections)):
            # Wakes who waits on it; closing alone would not.
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        self._connections.add(connection)
        with connection, contextlib.suppress(OSError):
            connection.settimeout(_IDLE_S)
            while message := connection.recv(len(_MESSAGE)):
                connection.sendall(message)
        self._connections.discard(connection)


def round_trip(address: str, timeout_s: float = PROBE_TIMEOUT_S) -> float:
    """Seconds that a message takes to HOST:PORT and back, on an open connection.

    Raises:
        OSError: nobody answered there within `timeout_s`.
    """
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout_s) as connection:
        connection.settimeout(timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        started = time.perf_counter()
        connection.sendall(_MESSAGE)
        if not connection.recv(len(_MESSAGE), socket.MSG_WAITALL):
            raise ConnectionResetError("the connection was closed")
        return time.perf_counter() - started


def unreachable(addresses: Sequence[str], timeout_s: float = PROBE_TIMEOUT_S) -> dict[str, str]:
    """Of `addresses` (HOST:PORT), those where nobody accepts a connection within `timeout_s`, with the reason."""

    def reason(address: str) -> str:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
        except TimeoutError:
            return f"no answer within {timeout_s:g} s"
        except OSError as error:
            return (error.strerror or str(error)).lower()
        return ""

    if not addresses:
        return {}
    with ThreadPoolExecutor(max_workers=min(32, len(addresses))) as pool:
        found = zip(addresses, pool.map(reason, addresses), strict=True)
        return {address: why for address, why in found if why}
