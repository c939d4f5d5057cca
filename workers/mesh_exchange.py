"""The exchange between CPU ranks: shared memory to ranks of the same host, a TCP connection to each of the others.

What a rank has for ranks of its host it lays out where they can read it, and they write results where it finds them in
its own order; to every other rank goes one message a round, and one comes. Waiting and copying are in kernels/mesh.h.

Shape suffixes as in exchange.py, and N: processes.
"""

import ctypes
import mmap
import os
import socket
import threading
import time
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.errors import ExchangeError
from workers.exchange import Dispatched, Exchange
from workers.exchange_links import Links
from workers.host_memory import HostMemory
from workers.kernels.build import load_kernels
from workers.prompt_limit import StepWork

# Waiting for a moment costs less than sleeping, where every rank has a core of its own.
SPIN_SECONDS = 50e-6
_TIMED_OUT, _GIVEN_UP, _PEER_LOST, _TOO_MANY, _STRANGE, _NOBODY = range(1, 7)


class _MeshPlan(ctypes.Structure):
    """Repeats MeshPlan in kernels/mesh.h."""

    _fields_ = (
        *((name, c_int64) for name in ("size", "index", "epoch")),
        *((name, c_void_p) for name in ("sockets", "places", "is_same_host", "memory")),
        *((name, c_int64) for name in ("capacity", "row_bytes", "spin_ns", "timeout_ns", "abort_event")),
    )


class _Traffic(ctypes.Structure):
    """Repeats Traffic in kernels/mesh.h."""

    _fields_ = tuple(
        (name, c_int64) for name in ("rows_sent", "sent_within", "sent_between", "received_within", "received_between")
    )


@dataclass(frozen=True)
class MeshShape:
    """What every rank of a group must be told alike.

    Attributes:
        capacity: rows that a process may dispatch at once.
        rows_per_token: experts a token goes to.
        row_bytes: bytes of a row at most.
        timeout_s: until a peer that does not answer is an error.
    """

    capacity: int
    rows_per_token: int
    row_bytes: int
    timeout_s: float


def memory_bytes(shape: MeshShape, ranks: int) -> int:
    """Of the memory that `ranks` of a host share.

    Raises:
        KernelError: this host has no kernels.
    """
    library = load_kernels()
    library.mesh_bytes.restype = c_int64
    return int(library.mesh_bytes(c_int64(ranks), c_int64(shape.capacity), c_int64(shape.row_bytes)))


class MeshExchange(Exchange):
    """A group whose members are connected and know which of them share memory (see exchange_join.py)."""

    def __init__(self, links: Links, memory: HostMemory, shape: MeshShape, epoch: int) -> None:
        self.index, self.size, self._epoch, self._shape = links.index, len(links.peers), epoch, shape
        self._peers, self._sockets, self._abort = links.peers, list(links.sockets.values()), links.abort
        self.neighbours = memory.members
        """Processes that share memory, this one among them."""
        self._lock = threading.Lock()
        self._memory: mmap.mmap | None = memory.memory
        self._library = _declare(load_kernels())
        fds = [links.sockets[other].fileno() if other != self.index else -1 for other in range(self.size)]
        places = {process: place for place, process in enumerate(memory.members)}
        is_same_host = (c_int32 * self.size)(*(peer.host == links.peers[self.index].host for peer in links.peers))
        # Linux gives no more cores by waiting for one that another rank needs.
        spin = SPIN_SECONDS if sum(is_same_host) <= len(os.sched_getaffinity(0)) else 0.0
        sockets = (c_int32 * self.size)(*fds)
        where = (c_int32 * self.size)(*(places.get(process, -1) for process in range(self.size)))
        plan = _MeshPlan(
            *(self.size, self.index, epoch),
            *(ctypes.addressof(array) for array in (sockets, where, is_same_host)),
            ctypes.addressof(ctypes.c_char.from_buffer(memory.memory)),
            *(shape.capacity, shape.row_bytes, int(spin * 1e9), int(shape.timeout_s * 1e9), self._abort.fd),
        )
        self._mesh: int | None = self._library.mesh_new(ctypes.byref(plan))
        self._traffic = _Traffic.from_address(self._library.mesh_traffic(self._handle()))
        self._results = torch.frombuffer(memory.memory, dtype=torch.uint8)[self._library.mesh_results(self._handle()) :]
        self._most_rows = 0

    def agree(self, work: StepWork) -> list[StepWork]:
        mine = (c_int64 * 2)(work.decode_tokens, work.prompt_tokens)
        everyone = (c_int64 * (2 * self.size))()
        self._check(self._library.mesh_agree(self._handle(), c_int64(self._shape.rows_per_token), mine, everyone))
        agreed = [StepWork(everyone[2 * rank], everyone[2 * rank + 1]) for rank in range(self.size)]
        self._most_rows = sum(each.tokens for each in agreed) * self._shape.rows_per_token
        return agreed

    def dispatch(self, x_RD: Tensor, process_R: Tensor, expert_R: Tensor) -> Dispatched:
        started = time.perf_counter()
        rows, dim = x_RD.shape
        row_bytes, shape = x_RD.element_size() * dim, self._shape
        if row_bytes > shape.row_bytes or rows > shape.capacity:
            raise ValueError(f"{shape.capacity} rows of {shape.row_bytes} bytes at most, got {rows} of {row_bytes}")
        x_SD = x_RD.new_empty(self._most_rows, dim)
        numbers_3S = torch.empty(3, self._most_rows, dtype=torch.int64)
        taken = c_int64(0)
        given = [tensor.contiguous() for tensor in (x_RD, process_R, expert_R)]
        self._check(
            self._library.mesh_dispatch(
                *(self._handle(), c_int64(rows), c_int64(row_bytes)),
                *(c_void_p(tensor.data_ptr()) for tensor in (*given, x_SD, *numbers_3S)),
                *(c_int64(self._most_rows), ctypes.byref(taken)),
            )
        )
        count = taken.value
        self._count(started)
        return Dispatched(x_SD[:count], numbers_3S[0, :count], (numbers_3S, given[1]))

    def combine(self, y_SD: Tensor, dispatched: Dispatched) -> Tensor:
        """As in `Exchange`; the result may be memory that the next `dispatch` uses again."""
        started = time.perf_counter()
        numbers_3S, process_R = dispatched.home
        rows, row_bytes = len(process_R), y_SD.element_size() * y_SD.shape[1]
        given = [tensor.contiguous() for tensor in (y_SD, numbers_3S[1], numbers_3S[2])]
        self._check(
            self._library.mesh_combine(
                *(self._handle(), c_int64(len(y_SD)), c_int64(row_bytes)),
                *(c_void_p(tensor.data_ptr()) for tensor in given),
                *(c_int64(rows), c_void_p(process_R.data_ptr())),
            )
        )
        self._count(started)
        room = self._shape.row_bytes
        bytes_RB = self._results[: rows * room].view(rows, room)[:, :row_bytes]
        return bytes_RB.contiguous().view(y_SD.dtype)

    def abort(self) -> None:
        with self._lock:
            if self._mesh is None:
                return
            self._abort.set()
            self._library.mesh_leave(self._handle())
            for sock in self._sockets:
                # Peers learn of it at once; the descriptors stay open for the call that may be under way.
                shut_down(sock)

    def close(self) -> None:
        self.abort()
        with self._lock:
            if self._mesh is None:
                return
            self._library.mesh_free(self._handle())
            self._mesh = None
            # Unmapped with the last result that is still in use.
            self._memory, self._results = None, torch.empty(0, dtype=torch.uint8)
            for sock in self._sockets:
                sock.close()
            self._abort.close()

    def _handle(self) -> c_void_p:
        if self._mesh is None:
            raise ExchangeError("exchange failed: it was closed")
        return c_void_p(self._mesh)

    def _count(self, started: float) -> None:
        traffic = self._traffic
        self.rows_sent = traffic.rows_sent
        self.bytes_within_host, self.bytes_between_hosts = traffic.sent_within, traffic.sent_between
        self.received_within_host, self.received_between_hosts = traffic.received_within, traffic.received_between
        self.seconds += time.perf_counter() - started

    def _check(self, outcome: int) -> None:
        if not outcome:
            return
        kind, subject, code = outcome & 255, outcome >> 8 & 0xFFFFFF, outcome >> 32
        if kind == _NOBODY:
            raise ValueError(f"row {subject} is for a process that is not in the group of {self.size}")
        if kind == _GIVEN_UP or self._abort.is_set:
            raise ExchangeError("exchange failed: it was aborted")
        peer = self._peers[subject]
        if kind == _TIMED_OUT:
            raise ExchangeError(f"exchange failed: {peer} did not answer within {self._shape.timeout_s:.0f} s")
        if kind == _PEER_LOST:
            raise ExchangeError(f"exchange failed: {peer} is gone" + (f" ({os.strerror(code)})" if code else ""))
        if kind == _TOO_MANY:
            raise ExchangeError(f"exchange failed: {peer} sent more rows than it agreed to")
        raise ExchangeError(f"exchange failed: {peer} sent what does not belong to this round of epoch {self._epoch}")


def shut_down(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the peer was faster


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    for name in ("agree", "dispatch", "combine", "results"):
        getattr(library, f"mesh_{name}").restype = c_int64
    library.mesh_new.restype = library.mesh_traffic.restype = c_void_p
    library.mesh_free.restype = library.mesh_leave.restype = None
    return library
