"""Where a rank's peers connect to exchange rows with it: one address for its whole life, for the epochs to come.

A thread takes connections and reads their hellos. Strangers, old epochs and hellos for somebody else are refused. Those
that may be right wait, by epoch and rank, until the epoch's exchange claims them: a peer may hear of an epoch earlier.
"""

import contextlib
import logging
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field

from workers.exchange_hello import HELLO_BYTES, Answer, Hello, HelloError, gang_digest, pack_answer
from workers.ports import PortRange, bind_port, join_address

log = logging.getLogger(__name__)

HELLO_SECONDS = 1.0
"""A connection that has not said who it is by then is dropped."""
MOST_SILENT = 128
"""Connections that have not said yet who they are; past them the oldest goes."""
MOST_WAITING = 1024
"""Connections of epochs to come."""


@dataclass
class _Caller:
    """A connection that has not said all of its hello."""

    sock: socket.socket
    deadline: float
    said: bytearray = field(default_factory=bytearray)


class ExchangeListener:
    """Listens from its construction to `close`.

    Args:
        ports: of which it takes the first that is free; None: any.

    Raises:
        UserError: no port is free, or `host` is not this machine's.
    """

    def __init__(self, gang_id: str, rank: int, incarnation: int, host: str, ports: PortRange | None = None) -> None:
        self.gang, self.rank, self.incarnation, self.host = gang_digest(gang_id), rank, incarnation, host
        self._server = bind_port(ports, host, "exchange_ports")
        self._server.setblocking(False)
        self.address = join_address(host, self._server.getsockname()[1])
        """HOST:PORT"""
        self._changed = threading.Condition()
        self._waiting: dict[tuple[int, int, int], socket.socket] = {}
        """By epoch, rank and incarnation."""
        self._claimed: set[tuple[int, int]] = set()
        self._epoch = 0
        """The newest that was claimed."""
        self._is_closed = False
        self._callers: dict[int, _Caller] = {}
        """By descriptor."""
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._selector.register(self._server, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="exchange-listener", daemon=True)
        self._thread.start()

    def claim(self, epoch: int, rank: int, incarnation: int, timeout_s: float) -> socket.socket | None:
        """The connection of a peer for an epoch, welcomed; None if it has not come within `timeout_s`. Connections
        for older epochs are refused from now on."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._begin(epoch)
            while True:
                for key in [key for key in self._waiting if key[:2] == (epoch, rank)]:
                    sock = self._waiting.pop(key)
                    if key[2] != incarnation:
                        _refuse(sock, Answer.OTHER_INCARNATION)
                    elif _say(sock, Answer.WELCOME):
                        self._claimed.add((epoch, rank))
                        return sock
                    else:
                        sock.close()
                if self._is_closed or not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    return None

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._wake.close()
        self._thread.join(5)

    def _begin(self, epoch: int) -> None:
        self._epoch = max(self._epoch, epoch)
        self._claimed = {key for key in self._claimed if key[0] >= self._epoch}
        for key in [key for key in self._waiting if key[0] < self._epoch]:
            _refuse(self._waiting.pop(key), Answer.OLD_EPOCH)

    # ---- the listener's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_closed:
                for key, _ in self._selector.select(self._until_next_deadline()):
                    if key.fileobj is self._server:
                        self._accept()
                    elif (caller := self._callers.get(key.fd)) is not None:
                        self._listen_to(caller)
                now = time.monotonic()
                for caller in [caller for caller in self._callers.values() if caller.deadline <= now]:
                    self._forget(caller)
                    caller.sock.close()
        finally:
            for sock in (*(caller.sock for caller in self._callers.values()), self._server, self._woken):
                sock.close()
            with self._changed:
                for sock in self._waiting.values():
                    sock.close()
                self._waiting.clear()
            self._selector.close()

    def _until_next_deadline(self) -> float | None:
        if not self._callers:
            return None
        return max(0.0, min(caller.deadline for caller in self._callers.values()) - time.monotonic())

    def _accept(self) -> None:
        try:
            sock, _ = self._server.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of descriptors, most likely: the one that waits is tried again.
            log.warning("rank %d cannot take an exchange connection: %s", self.rank, error)
            time.sleep(0.05)
            return
        if len(self._callers) >= MOST_SILENT:
            oldest = min(self._callers.values(), key=lambda caller: caller.deadline)
            self._forget(oldest)
            oldest.sock.close()
        sock.setblocking(False)
        self._callers[sock.fileno()] = _Caller(sock, time.monotonic() + HELLO_SECONDS)
        self._selector.register(sock, selectors.EVENT_READ)

    def _listen_to(self, caller: _Caller) -> None:
        try:
            said = caller.sock.recv(HELLO_BYTES - len(caller.said))
        except BlockingIOError:
            return
        except OSError:
            said = b""
        caller.said += said
        if not said:
            self._forget(caller)
            caller.sock.close()
        elif len(caller.said) == HELLO_BYTES:
            self._forget(caller)
            self._receive(caller)

    def _receive(self, caller: _Caller) -> None:
        try:
            hello = Hello.unpack(bytes(caller.said))
            if hello.gang != self.gang:
                raise HelloError(Answer.OTHER_GANG)
            if (hello.to_rank, hello.to_incarnation) != (self.rank, self.incarnation):
                raise HelloError(Answer.OTHER_RANK)
            self._keep(hello, caller.sock)
        except HelloError as error:
            _refuse(caller.sock, error.answer)

    def _keep(self, hello: Hello, sock: socket.socket) -> None:
        key = hello.epoch, hello.rank, hello.incarnation
        with self._changed:
            if hello.epoch < self._epoch:
                raise HelloError(Answer.OLD_EPOCH)
            if key[:2] in self._claimed:
                raise HelloError(Answer.TAKEN)
            # Of one rank only its newest connection counts.
            if (older := self._waiting.pop(key, None)) is not None:
                older.close()
            if len(self._waiting) >= MOST_WAITING:
                raise HelloError(Answer.BUSY)
            self._waiting[key] = sock
            self._changed.notify_all()

    def _forget(self, caller: _Caller) -> None:
        self._selector.unregister(caller.sock)
        del self._callers[caller.sock.fileno()]


def _say(sock: socket.socket, answer: Answer) -> bool:
    try:
        # A few bytes always fit the buffer of a new connection.
        sock.send(pack_answer(answer))
    except OSError:
        return False
    return True


def _refuse(sock: socket.socket, answer: Answer) -> None:
    _say(sock, answer)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
    sock.close()
