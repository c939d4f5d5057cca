"""The exchange between CPU ranks where a host has no kernels: the messages of kernels/wires.h, sent from Python.

Ranks with kernels and ranks without understand each other. Shape suffixes as in exchange.py.
"""

import select
import socket
import struct
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.abort_signal import AbortedError
from workers.errors import ExchangeError
from workers.exchange import Dispatched, Exchange
from workers.exchange_links import Links
from workers.mesh_exchange import MeshShape, shut_down
from workers.prompt_limit import StepWork

MAGIC = 0x52415643
AGREE, DISPATCH, COMBINE = 1, 2, 3
_HEADER = struct.Struct("=IIQQqqqqq")
"""Repeats Header in kernels/wires.h: magic, kind, epoch, round, rows, bytes of a row, work (2), spare."""
_EXPERT_BYTES = 8


@dataclass
class _Message:
    """One that comes: its header, then its body."""

    header: tuple[int, ...] = ()
    body: bytearray | None = None
    missing: memoryview | None = None
    """What has not come of the part that is being read."""


@dataclass(frozen=True)
class _Home:
    """How rows came and went: what combine undoes."""

    sent: list[Tensor]
    """Numbers of the rows that went to each process."""
    received: list[int]
    """Rows that came from each process."""


class PlainExchange(Exchange):
    """A group whose members are connected; shares no memory."""

    def __init__(self, links: Links, shape: MeshShape, epoch: int) -> None:
        self.index, self.size, self._epoch, self._shape = links.index, len(links.peers), epoch, shape
        self.neighbours = [self.index]
        self._peers, self._sockets, self._abort = links.peers, links.sockets, links.abort
        self._process = {sock: other for other, sock in links.sockets.items()}
        self._round = 0
        self._agreed_rows = [0] * self.size

    def agree(self, work: StepWork) -> list[StepWork]:
        nothing: dict[int, list[Tensor]] = {other: [] for other in self._sockets}
        came = self._talk(AGREE, 0, nothing, dict.fromkeys(self._sockets, 0), work)
        agreed = [work] * self.size
        for other, message in came.items():
            agreed[other] = StepWork(*message.header[6:8])
        self._agreed_rows = [each.tokens * self._shape.rows_per_token for each in agreed]
        return agreed

    def dispatch(self, x_RD: Tensor, process_R: Tensor, expert_R: Tensor) -> Dispatched:
        started = time.perf_counter()
        dim, row_bytes = x_RD.shape[1], x_RD.shape[1] * x_RD.element_size()
        if len(process_R) and not 0 <= int(process_R.min()) <= int(process_R.max()) < self.size:
            raise ValueError(f"a row is for a process that is not in the group of {self.size}")
        sent = [torch.nonzero(process_R == process).squeeze(1) for process in range(self.size)]
        bodies = {other: [expert_R[sent[other]], x_RD[sent[other]]] for other in self._sockets}
        came = self._talk(DISPATCH, row_bytes, bodies, dict(enumerate(self._agreed_rows)))
        x_parts, expert_parts = [], []
        for process in range(self.size):
            if process == self.index:
                x_parts.append(x_RD[sent[process]])
                expert_parts.append(expert_R[sent[process]])
            else:
                message = came[process]
                split = message.header[4] * _EXPERT_BYTES
                expert_parts.append(_tensor(message, 0, split).view(torch.int64))
                x_parts.append(_tensor(message, split, None).view(x_RD.dtype).view(-1, dim))
        self.rows_sent += len(process_R) - len(sent[self.index])
        self.seconds += time.perf_counter() - started
        return Dispatched(torch.cat(x_parts), torch.cat(expert_parts), _Home(sent, [len(part) for part in x_parts]))

    def combine(self, y_SD: Tensor, dispatched: Dispatched) -> Tensor:
        started = time.perf_counter()
        home: _Home = dispatched.home
        dim, row_bytes = y_SD.shape[1], y_SD.shape[1] * y_SD.element_size()
        parts = y_SD.split(home.received)
        most = {other: len(home.sent[other]) for other in self._sockets}
        came = self._talk(COMBINE, row_bytes, {other: [parts[other]] for other in self._sockets}, most)
        y_RD = y_SD.new_empty(sum(len(rows) for rows in home.sent), dim)
        y_RD[home.sent[self.index]] = parts[self.index]
        for other, message in came.items():
            if message.header[4] != most[other]:
                raise self._strange(other)
            y_RD[home.sent[other]] = _tensor(message, 0, None).view(y_SD.dtype).view(-1, dim)
        self.seconds += time.perf_counter() - started
        return y_RD

    def abort(self) -> None:
        self._abort.set()
        for sock in self._sockets.values():
            shut_down(sock)

    def close(self) -> None:
        self.abort()
        for sock in self._sockets.values():
            sock.close()
        self._abort.close()

    # ---- one round of messages -----------------------------------------------------------------------------------

    def _talk(
        self,
        kind: int,
        row_bytes: int,
        bodies: dict[int, list[Tensor]],
        most_rows: dict[int, int],
        work: StepWork | None = None,
    ) -> dict[int, _Message]:
        """One message to every peer and one from each, whatever is ready first."""
        if self._abort.is_set:
            raise ExchangeError("exchange failed: it was aborted")
        self._round += 1
        tokens = (work.decode_tokens, work.prompt_tokens) if work else (0, 0)
        sending, receiving = {}, {other: _Message() for other in bodies}
        for other, parts in bodies.items():
            rows = len(parts[0]) if parts else 0
            header = _HEADER.pack(MAGIC, kind, self._epoch, self._round, rows, row_bytes, *tokens, 0)
            message = b"".join([header, *(_bytes(part) for part in parts)])
            self._count(other, len(message), 0)
            sending[other] = memoryview(message)
        came: dict[int, _Message] = {}
        deadline = time.monotonic() + self._shape.timeout_s
        while sending or receiving:
            events = {
                self._sockets[other]: (select.POLLOUT if other in sending else 0)
                | (select.POLLIN if other in receiving else 0)
                for other in sending.keys() | receiving.keys()
            }
            for sock in self._wait(events, deadline):
                other = self._process[sock]
                try:
                    if other in sending and not self._push(other, sending):
                        del sending[other]
                    if other in receiving and self._pull(other, receiving[other], (kind, row_bytes, most_rows[other])):
                        came[other] = receiving.pop(other)
                except OSError as error:
                    if self._abort.is_set:
                        raise ExchangeError("exchange failed: it was aborted") from None
                    raise ExchangeError(f"exchange failed: {self._peers[other]} is gone ({error.strerror})") from None
        return came

    def _wait(self, events: dict[socket.socket, int], deadline: float) -> list[socket.socket]:
        try:
            found = self._abort.wait(events, deadline)
        except AbortedError:
            raise ExchangeError("exchange failed: it was aborted") from None
        if not found:
            silent = self._peers[min(self._process[sock] for sock in events)]
            raise ExchangeError(f"exchange failed: {silent} did not answer within {self._shape.timeout_s:.0f} s")
        return list(found)

    def _push(self, other: int, sending: dict[int, memoryview]) -> int:
        """Bytes that are left to send."""
        try:
            sending[other] = sending[other][self._sockets[other].send(sending[other]) :]
        except BlockingIOError:
            pass
        return len(sending[other])

    def _pull(self, other: int, message: _Message, expected: tuple[int, int, int]) -> bool:
        """Whether the whole message is here."""
        sock = self._sockets[other]
        while True:
            if message.missing is None:
                message.body = bytearray(_HEADER.size)
                message.missing = memoryview(message.body)
            while len(message.missing):
                try:
                    came = sock.recv_into(message.missing)
                except BlockingIOError:
                    return False
                if not came:
                    raise OSError(0, "it closed the connection")
                message.missing = message.missing[came:]
            assert message.body is not None
            if message.header:
                self._count(other, 0, _HEADER.size + len(message.body))
                return True
            message.header = _HEADER.unpack(message.body)
            message.body = bytearray(self._body_bytes(other, message.header, expected))
            message.missing = memoryview(message.body)

    def _body_bytes(self, other: int, header: tuple[int, ...], expected: tuple[int, int, int]) -> int:
        kind, row_bytes, most_rows = expected
        if header[:4] != (MAGIC, kind, self._epoch, self._round) or header[4] < 0 or header[5] != row_bytes:
            raise self._strange(other)
        if header[4] > most_rows:
            raise ExchangeError(f"exchange failed: {self._peers[other]} sent more rows than it agreed to")
        return header[4] * (row_bytes + (_EXPERT_BYTES if kind == DISPATCH else 0))

    def _strange(self, other: int) -> ExchangeError:
        return ExchangeError(
            f"exchange failed: {self._peers[other]} sent what does not belong to this round of epoch {self._epoch}"
        )

    def _count(self, other: int, sent: int, received: int) -> None:
        if self._peers[other].host == self._peers[self.index].host:
            self.bytes_within_host += sent
            self.received_within_host += received
        else:
            self.bytes_between_hosts += sent
            self.received_between_hosts += received


def _bytes(rows: Tensor) -> bytes:
    return rows.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _tensor(message: _Message, start: int, stop: int | None) -> Tensor:
    """A copy: numbers begin wherever the message's parts do."""
    assert message.body is not None
    if not message.body:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(message.body, dtype=torch.uint8)[start:stop].clone()
