"""The exchange between ranks of one host, through memory that they share: no sockets, no packing, no needless copy.

Every rank lays out its rows where all can read them and takes the rows of others that are for it; results are written
where their owner finds them in its own order. How ranks wait for each other stands in kernels/meeting.h.

The memory belongs to no file (memfd): it goes with the last process, however that ends.

Shape suffixes as in exchange.py, and N: processes.
"""

import ctypes
import logging
import mmap
import os
import secrets
import time
from ctypes import c_int64, c_void_p
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from workers.errors import ExchangeError
from workers.exchange import Dispatched, Exchange
from workers.kernels.build import KernelError, load_kernels
from workers.prompt_limit import StepWork
from workers.rendezvous import connect

log = logging.getLogger(__name__)

# Waiting for a moment costs less than sleeping, where every rank has a core of its own.
SPIN_SECONDS = 50e-6
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class _Meeting(ctypes.Structure):
    _fields_ = (
        ("memory", c_void_p),
        *((name, c_int64) for name in ("size", "index", "capacity", "room", "row_bytes", "spin_ns", "timeout_ns")),
        *((name, c_void_p) for name in ("given_up", "peers")),
    )


class SharedExchange(Exchange):
    """A group of processes of one host that found each other with `join_shared`.

    Args:
        capacity: rows that a process may dispatch at once.
        rows_per_token: experts a token goes to.
        row_bytes: bytes of a row at most.
        memory: what all of them share.
        pids: their processes, in group order.
    """

    def __init__(
        self,
        index: int,
        pids: list[int],
        capacity: int,
        rows_per_token: int,
        row_bytes: int,
        timeout_s: float,
        memory: mmap.mmap,
    ) -> None:
        self.index, self.size = index, len(pids)
        self._pids, self._rows_per_token, self._room = pids, rows_per_token, row_bytes
        self._timeout_s, self._memory = timeout_s, memory
        self._library = load_kernels()
        for name in ("results", "agree", "dispatch", "combine"):
            getattr(self._library, f"meeting_{name}").restype = c_int64
        self._given_up = ctypes.c_int32(0)
        self._pidfds = [-1 if pid == os.getpid() else os.pidfd_open(pid) for pid in pids]
        self._peers = (ctypes.c_int32 * self.size)(*self._pidfds)
        # Linux gives no more cores by waiting for one that another rank needs.
        spin = SPIN_SECONDS if self.size <= len(os.sched_getaffinity(0)) else 0.0
        self._meeting = _Meeting(
            ctypes.addressof(ctypes.c_char.from_buffer(memory)),
            *(self.size, index, capacity, row_bytes, row_bytes, int(spin * 1e9), int(timeout_s * 1e9)),
            *(ctypes.addressof(self._given_up), ctypes.addressof(self._peers)),
        )
        self._results = torch.frombuffer(memory, dtype=torch.uint8)[self._library.meeting_results(self._by_ref()) :]
        self._agreements = 0
        self._most_rows = 0

    def agree(self, work: StepWork) -> list[StepWork]:
        mine = (c_int64 * 2)(work.decode_tokens, work.prompt_tokens)
        everyone = (c_int64 * (2 * self.size))()
        self._agreements += 1
        self._check(self._library.meeting_agree(self._by_ref(), c_int64(self._agreements), mine, everyone))
        agreed = [StepWork(everyone[2 * rank], everyone[2 * rank + 1]) for rank in range(self.size)]
        self._most_rows = sum(each.tokens for each in agreed) * self._rows_per_token
        return agreed

    def dispatch(self, x_RD: Tensor, process_R: Tensor, expert_R: Tensor) -> Dispatched:
        started = time.perf_counter()
        rows, dim = x_RD.shape
        row_bytes = x_RD.element_size() * dim
        if row_bytes > self._room or rows > self._meeting.capacity:
            raise ValueError(f"{self._meeting.capacity} rows of {self._room} bytes at most, got {rows} of {row_bytes}")
        self._meeting.row_bytes = row_bytes
        x_SD = x_RD.new_empty(self._most_rows, dim)
        numbers_3S = torch.empty(3, self._most_rows, dtype=torch.int64)
        taken = c_int64(0)
        given = [tensor.contiguous() for tensor in (x_RD, process_R, expert_R)]
        self._check(
            self._library.meeting_dispatch(
                self._by_ref(),
                c_int64(rows),
                *(c_void_p(tensor.data_ptr()) for tensor in (*given, x_SD, *numbers_3S)),
                c_int64(self._most_rows),
                ctypes.byref(taken),
            )
        )
        count = taken.value
        own = int((process_R == self.index).sum())
        self.rows_sent += rows - own
        self.bytes_sent += (rows - own) * (row_bytes + 8)
        self.bytes_received += (count - own) * (row_bytes + 8)
        self.seconds += time.perf_counter() - started
        return Dispatched(x_SD[:count], numbers_3S[0, :count], (numbers_3S, rows, own))

    def combine(self, y_SD: Tensor, dispatched: Dispatched) -> Tensor:
        """As in `Exchange`; the result is shared memory and lasts until the next `dispatch`."""
        started = time.perf_counter()
        numbers_3S, rows, own = dispatched.home
        given = [tensor.contiguous() for tensor in (y_SD, numbers_3S[1], numbers_3S[2])]
        pointers = [c_void_p(tensor.data_ptr()) for tensor in given]
        self._check(self._library.meeting_combine(self._by_ref(), c_int64(len(y_SD)), *pointers))
        row_bytes = self._meeting.row_bytes
        self.bytes_sent += (len(y_SD) - own) * row_bytes
        self.bytes_received += (rows - own) * row_bytes
        self.seconds += time.perf_counter() - started
        bytes_RB = self._results[: rows * self._room].view(rows, self._room)[:, :row_bytes]
        return bytes_RB.contiguous().view(y_SD.dtype)

    def close(self) -> None:
        self._given_up.value = 1
        self._library.meeting_leave(self._by_ref())
        for pidfd in self._pidfds:
            if pidfd >= 0:
                os.close(pidfd)
        self._pidfds = []

    def _by_ref(self) -> object:
        return ctypes.byref(self._meeting)

    def _check(self, outcome: int) -> None:
        if not outcome:
            return
        kind, process = outcome & 255, outcome >> 8
        if kind == 1:
            raise ExchangeError(f"exchange failed: process {process} did not answer within {self._timeout_s:.0f} s")
        if kind == 3:
            raise ExchangeError(f"exchange failed: process {process} (pid {self._pids[process]}) is gone")
        if kind == 4:
            raise ExchangeError(f"exchange failed: process {process} sent more rows than it agreed to")
        raise ExchangeError("exchange failed: it was closed")


def join_shared(
    store_address: str,
    epoch: int,
    index: int,
    size: int,
    capacity: int,
    rows_per_token: int,
    row_bytes: int,
    timeout_s: float,
) -> SharedExchange | None:
    """Meet the other processes of the epoch in shared memory; None on every one of them where any cannot: on another
    host, in another container, or without kernels.

    Raises:
        ExchangeError: not all of them came within `timeout_s`.
    """
    try:
        store = dist.PrefixStore(f"shared{epoch}", connect(store_address, timeout_s))
        exchange, reason = None, ""
        store.set(f"pid{index}", f"{_host()} {os.getpid()}")
        try:
            pids = [_pid(store.get(f"pid{other}").decode()) for other in range(size)]
            exchange = _open(store, index, pids, capacity, rows_per_token, row_bytes, timeout_s)
        except (OSError, ValueError, KernelError, _ElsewhereError) as error:
            reason = str(error) or repr(error)
        if index == 0 and exchange is None:
            store.set("memory", "")
        store.set(f"joined{index}", "joined" if exchange else reason)
        told = [store.get(f"joined{other}").decode() for other in range(size)]
        reason = next((each for each in told if each != "joined"), "")
        if not reason:
            return exchange
        log.warning("ranks exchange through torch.distributed, not through shared memory: %s", reason)
        if exchange is not None:
            exchange.close()
        return None
    except RuntimeError as error:
        raise ExchangeError(
            f"group of {size} ranks not formed over {store_address} within {timeout_s:.0f} s: {error}"
        ) from error


class _ElsewhereError(Exception):
    """A process of the group is not on this host."""


def _host() -> str:
    return _BOOT_ID.read_text(encoding="ascii").strip() if _BOOT_ID.exists() else secrets.token_hex(8)


def _pid(told: str) -> int:
    host, _, pid = told.partition(" ")
    if host != _host():
        raise _ElsewhereError("ranks are on several hosts")
    return int(pid)


def _open(
    store: dist.Store,
    index: int,
    pids: list[int],
    capacity: int,
    rows_per_token: int,
    row_bytes: int,
    timeout_s: float,
) -> SharedExchange:
    library = load_kernels()
    library.meeting_bytes.restype = c_int64
    size = library.meeting_bytes(ctypes.byref(_Meeting(None, len(pids), 0, capacity, row_bytes, 0, 0, 0, None, None)))
    if index == 0:
        name = f"caravan-{secrets.token_hex(8)}"
        memfd = os.memfd_create(name)
    else:
        path, _, name = store.get("memory").decode().partition(" ")
        if not path or name not in os.readlink(path):
            raise _ElsewhereError("ranks do not see each other's processes")
        memfd = os.open(path, os.O_RDWR)
    try:
        if index == 0:
            os.posix_fallocate(memfd, 0, size)  # now, or a write would end in SIGBUS when memory is short
            store.set("memory", f"/proc/{os.getpid()}/fd/{memfd} {name}")
        memory = mmap.mmap(memfd, size)
        exchange = SharedExchange(index, pids, capacity, rows_per_token, row_bytes, timeout_s, memory)
        if index == 0:  # its descriptor is what the others open
            for other in range(1, len(pids)):
                store.get(f"joined{other}")
        return exchange
    finally:
        os.close(memfd)
