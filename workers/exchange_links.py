"""One TCP connection to every other rank of an epoch: of a pair, the one further back in the group connects."""

import errno
import os
import select
import socket
import time
from dataclasses import dataclass

from workers.abort_signal import AbortedError, AbortSignal
from workers.errors import ExchangeError, UserError
from workers.exchange_hello import ANSWER_BYTES, REASONS, Answer, Hello, unpack_answer
from workers.exchange_listener import ExchangeListener
from workers.ports import split_address

CONNECT_SECONDS = 10.0
"""For one connection to be made: whoever listens does so from its start, so only the network takes time."""
REFUSED_SECONDS = 2.0
"""A port is closed that was refused for so long."""
CLAIM_SECONDS = 0.05
"""Between two looks at what else may have happened while a peer's connection is awaited."""
# A connection that lies idle must stay known to firewalls between hosts.
KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
)


@dataclass(frozen=True)
class Peer:
    """A member of an epoch, this rank among them."""

    rank: int
    incarnation: int
    host: str
    """Address of its host; ranks with the same one share it."""
    address: str
    """HOST:PORT where it takes exchange connections."""

    def __str__(self) -> str:
        return f"rank {self.rank} at {self.address}"


class Links:
    """Connections to all other members, made by `connect`; the calls here are for the time before rows are exchanged.

    Every method raises ExchangeError, which names the peer, when that is gone or silent past `deadline`, and when
    `abort` is set.
    """

    def __init__(self, peers: list[Peer], index: int, abort: AbortSignal, deadline: float) -> None:
        self.peers, self.index, self.abort, self._deadline = peers, index, abort, deadline
        self.sockets: dict[int, socket.socket] = {}
        """By place in the group; none to this rank itself."""

    def connect(self, listener: ExchangeListener, epoch: int) -> None:
        for other in range(self.index):
            self.sockets[other] = self._dial(other)
            peer, me = self.peers[other], self.peers[self.index]
            hello = Hello(listener.gang, epoch, me.rank, me.incarnation, peer.rank, peer.incarnation)
            self.send(other, hello.pack())
        missing, unanswered = set(range(self.index + 1, len(self.peers))), set(range(self.index))
        while missing or unanswered:
            self._read_answers(unanswered, 0.0 if missing else CONNECT_SECONDS)
            for number, other in enumerate(sorted(missing)):
                peer = self.peers[other]
                # The first is waited for; the others may be here already.
                sock = listener.claim(epoch, peer.rank, peer.incarnation, 0.0 if number else CLAIM_SECONDS)
                if sock is not None:
                    self.sockets[other] = sock
                    missing.remove(other)
            if time.monotonic() > self._deadline and (missing or unanswered):
                absent = ", ".join(str(self.peers[other]) for other in sorted(missing | unanswered))
                raise ExchangeError(f"the group was not formed in time: nothing came from {absent}")
        for sock in self.sockets.values():
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for option in KEEPALIVE:
                sock.setsockopt(*option)

    def send(self, other: int, message: bytes) -> None:
        try:
            while message:
                try:
                    message = message[self.sockets[other].send(message) :]
                except BlockingIOError:
                    self._wait(other, select.POLLOUT)
        except OSError as error:
            raise self._lost(other, error) from None

    def receive(self, other: int, size: int) -> bytes:
        message = b""
        try:
            while len(message) < size:
                self._wait(other, select.POLLIN)
                part = self.sockets[other].recv(size - len(message))
                if not part:
                    raise ExchangeError(f"exchange failed: {self.peers[other]} is gone")
                message += part
        except OSError as error:
            raise self._lost(other, error) from None
        return message

    def close(self) -> None:
        for sock in self.sockets.values():
            sock.close()

    def _wait(self, other: int, events: int) -> None:
        if not self._poll({self.sockets[other]: events}, self._deadline):
            raise ExchangeError(f"exchange failed: {self.peers[other]} did not answer in time")

    def _poll(self, events: dict[socket.socket, int], deadline: float) -> dict[socket.socket, int]:
        try:
            return self.abort.wait(events, deadline)
        except AbortedError:
            raise ExchangeError("exchange failed: it was aborted") from None

    def _lost(self, other: int, error: OSError) -> ExchangeError:
        return ExchangeError(f"exchange failed: {self.peers[other]} is gone ({error.strerror})")

    def _read_answers(self, unanswered: set[int], timeout_s: float) -> None:
        deadline = min(time.monotonic() + timeout_s, self._deadline)
        found = self._poll({self.sockets[other]: select.POLLIN for other in unanswered}, deadline)
        for other in [other for other in unanswered if self.sockets[other] in found]:
            answer = unpack_answer(self.receive(other, ANSWER_BYTES))
            if answer != Answer.WELCOME:
                reason = REASONS[answer] if answer is not None else "what listens there is no rank"
                raise ExchangeError(f"{self.peers[other]} refused the connection: {reason}")
            unanswered.remove(other)

    def _dial(self, other: int) -> socket.socket:
        peer, own = self.peers[other], self.peers[self.index].host.strip("[]")
        started = time.monotonic()
        deadline = min(started + CONNECT_SECONDS, self._deadline)
        while True:
            try:
                family, kind, protocol, _, address = socket.getaddrinfo(
                    *split_address(peer.address), type=socket.SOCK_STREAM
                )[0]
            except (OSError, UserError) as error:
                raise ExchangeError(f"{peer}: not an address ({error})") from None
            sock = socket.socket(family, kind, protocol)
            sock.setblocking(False)
            try:
                # By the interface of this host's address, which is what firewalls are told.
                sock.bind((own, 0))
                code = sock.connect_ex(address)
                if code == errno.EINPROGRESS:
                    in_time = self._poll({sock: select.POLLOUT}, deadline)
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if in_time else errno.ETIMEDOUT
            except BaseException:
                sock.close()
                raise
            if not code:
                return sock
            sock.close()
            now = time.monotonic()
            if now > deadline or now > started + REFUSED_SECONDS or code == errno.ETIMEDOUT:
                raise ExchangeError(
                    f"{peer} cannot be reached from {own}: {os.strerror(code)}; is the port open between the hosts?"
                )
            self._poll({}, min(deadline, now + 0.1))
