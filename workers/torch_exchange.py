"""The exchange over torch.distributed: Gloo between CPUs, NCCL between GPUs.

Two modes, chosen by what every process learned when it opened the step. **Padded**: few tokens, so each pair exchanges
a buffer of a fixed size with the expert numbers inside; one collective a direction. **Counted**: many tokens, so the
counts go ahead and the rows follow without padding.

A message is a row's bytes with its expert's number behind them. Shape suffixes as in exchange.py, and B: bytes of a
message, C: messages of one padded buffer.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from workers.errors import ExchangeError
from workers.exchange import Dispatched, Exchange
from workers.prompt_limit import StepWork
from workers.rendezvous import connect

# Bytes of one padded buffer up to which padding costs less than another collective for the counts.
PADDED_LIMIT_BYTES = 64 * 1024
_EXPERT_BYTES = 8
# Between two looks whether a wait was given up: Gloo has no way to end a collective.
_LOOK_AROUND = timedelta(milliseconds=20)


@dataclass(frozen=True)
class _Home:
    """How dispatched rows came: what combine undoes."""

    order_R: Tensor
    """Rows in the order they were sent: by process."""
    sent: list[int]
    """Rows sent to each process (counted mode)."""
    received: list[int]
    """Rows received from each process (counted mode)."""
    place_R: Tensor | None = None
    """Padded mode: where in the buffers each sent row stood, [R], and each received one, [S]."""
    place_S: Tensor | None = None


class TorchExchange(Exchange):
    """A process group of its own, one an epoch; groups of several epochs may exist side by side.

    Args:
        store_address: HOST:PORT of the epoch's rendezvous store.
        host: address of this host, which chooses the interface Gloo listens on.
        device: where the rows live; CUDA takes NCCL, anything else Gloo.
        rows_per_token: experts a token goes to.
        row_bytes: bytes of one row.
        timeout_s: seconds until a peer that does not answer is an error.
        padded_limit_bytes: largest buffer sent padded; 0 always counts.
        hosts: host of each process, to tell traffic within a host from that between hosts; empty: all on one.

    Raises:
        ExchangeError: the group could not be formed within `timeout_s`.
    """

    def __init__(
        self,
        store_address: str,
        epoch: int,
        index: int,
        size: int,
        host: str,
        device: torch.device,
        rows_per_token: int,
        row_bytes: int,
        timeout_s: float,
        padded_limit_bytes: int = PADDED_LIMIT_BYTES,
        hosts: Sequence[str] = (),
    ) -> None:
        self.index, self.size, self._device = index, size, device
        self._is_near = [not hosts or other == hosts[index] for other in hosts or range(size)]
        self._aborted = threading.Event()
        self._rows_per_token, self._row_bytes, self._padded_limit = rows_per_token, row_bytes, padded_limit_bytes
        self._capacity: int | None = None
        try:
            store = dist.PrefixStore(f"epoch{epoch}", connect(store_address, timeout_s))
            self._group = _new_group(store, index, size, host, device, timedelta(seconds=timeout_s))
            self.agree(StepWork())
        except (RuntimeError, ExchangeError) as error:
            raise ExchangeError(
                f"process group of {size} ranks not formed over {store_address} within {timeout_s:.0f} s: {error}"
            ) from error

    def agree(self, work: StepWork) -> list[StepWork]:
        mine = torch.tensor([work.decode_tokens, work.prompt_tokens], dtype=torch.int64, device=self._device)
        everyone = torch.empty(2 * self.size, dtype=torch.int64, device=self._device)
        with _errors():
            self._wait(self._group._allgather_base(everyone, mine))
        agreed = [StepWork(*each) for each in everyone.view(self.size, 2).tolist()]
        rows = max(each.tokens for each in agreed) * self._rows_per_token
        self._capacity = rows if rows * (self._row_bytes + _EXPERT_BYTES) <= self._padded_limit else None
        return agreed

    def dispatch(self, x_RD: Tensor, process_R: Tensor, expert_R: Tensor) -> Dispatched:
        started = time.perf_counter()
        order_R = torch.argsort(process_R, stable=True)
        sent = torch.bincount(process_R, minlength=self.size)
        messages_RB = _pack(x_RD[order_R], expert_R[order_R])
        if self._capacity is None:
            dispatched = self._dispatch_counted(messages_RB, order_R, sent, x_RD)
        else:
            dispatched = self._dispatch_padded(messages_RB, order_R, sent, process_R, x_RD)
        self.rows_sent += len(order_R) - int(sent[self.index])
        self.seconds += time.perf_counter() - started
        return dispatched

    def combine(self, y_SD: Tensor, dispatched: Dispatched) -> Tensor:
        started = time.perf_counter()
        home: _Home = dispatched.home
        if home.place_R is None or home.place_S is None:
            y_sent_RD = y_SD.new_empty(len(home.order_R), y_SD.shape[1])
            self._all_to_all(y_sent_RD, y_SD, home.sent, home.received)
        else:
            buffers = y_SD.new_zeros(self.size * self._buffer_rows(), y_SD.shape[1])
            arrived = torch.empty_like(buffers)
            buffers[home.place_S] = y_SD
            self._all_to_all(arrived, buffers)
            y_sent_RD = arrived[home.place_R]
        y_RD = torch.empty_like(y_sent_RD)
        y_RD[home.order_R] = y_sent_RD
        self.seconds += time.perf_counter() - started
        return y_RD

    def abort(self) -> None:
        """As in `Exchange`; but peers on Gloo do not notice before their time is over, unless they abort too."""
        self._aborted.set()
        if self._device.type == "cuda":
            self._group.abort()

    def close(self) -> None:
        self._group.abort()

    def _wait(self, work: Any) -> None:
        if self._device.type == "cuda":
            work.wait()
            return
        while True:
            if self._aborted.is_set():
                # A group waits in its destructor for what is under way: nobody else shall.
                threading.Thread(target=_outlive, args=(self._group, work), daemon=True).start()
                raise ExchangeError("exchange failed: it was aborted")
            with suppress(RuntimeError):
                work.wait(_LOOK_AROUND)
            if work.is_completed():
                # Says how it ended: the wait before may have failed for its own time alone.
                work.wait()
                return

    def _dispatch_counted(self, messages_RB: Tensor, order_R: Tensor, sent_N: Tensor, x_RD: Tensor) -> Dispatched:
        received_N = torch.empty_like(sent_N)
        self._all_to_all(received_N, sent_N)
        sent, received = sent_N.tolist(), received_N.tolist()
        messages_SB = messages_RB.new_empty(sum(received), messages_RB.shape[1])
        self._all_to_all(messages_SB, messages_RB, received, sent)
        x_SD, expert_S = _unpack(messages_SB, x_RD.dtype)
        return Dispatched(x_SD, expert_S, _Home(order_R, sent, received))

    def _dispatch_padded(
        self, messages_RB: Tensor, order_R: Tensor, sent_N: Tensor, process_R: Tensor, x_RD: Tensor
    ) -> Dispatched:
        rows = self._buffer_rows()
        first_N = torch.cumsum(sent_N, 0) - sent_N
        process_sorted_R = process_R[order_R]
        place_R = torch.arange(len(order_R), device=self._device) - first_N[process_sorted_R] + process_sorted_R * rows
        # All ones is expert -1: nobody's row.
        buffers = messages_RB.new_full((self.size * rows, messages_RB.shape[1]), 255)
        arrived = torch.empty_like(buffers)
        buffers[place_R] = messages_RB
        self._all_to_all(arrived, buffers)
        x, expert = _unpack(arrived, x_RD.dtype)
        place_S = torch.nonzero(expert >= 0).squeeze(1)
        return Dispatched(x[place_S], expert[place_S], _Home(order_R, [], [], place_R, place_S))

    def _buffer_rows(self) -> int:
        assert self._capacity is not None
        return self._capacity

    def _all_to_all(
        self, output: Tensor, source: Tensor, output_rows: list[int] | None = None, source_rows: list[int] | None = None
    ) -> None:
        with _errors():
            self._wait(self._group.alltoall_base(output, source, output_rows or [], source_rows or []))
        within, between = self._bytes_to_others(source, source_rows)
        self.bytes_within_host += within
        self.bytes_between_hosts += between
        within, between = self._bytes_to_others(output, output_rows)
        self.received_within_host += within
        self.received_between_hosts += between

    def _bytes_to_others(self, rows: Tensor, counts: list[int] | None) -> tuple[int, int]:
        """Within this host, between hosts."""
        if not len(rows):
            return 0, 0
        counts = counts or [len(rows) // self.size] * self.size
        near = sum(count for count, is_near in zip(counts, self._is_near, strict=True) if is_near) - counts[self.index]
        far = sum(count for count, is_near in zip(counts, self._is_near, strict=True) if not is_near)
        row_bytes = rows[0].numel() * rows.element_size()
        return near * row_bytes, far * row_bytes


def _pack(x_RD: Tensor, expert_R: Tensor) -> Tensor:
    return torch.cat([x_RD.contiguous().view(torch.uint8), expert_R[:, None].view(torch.uint8)], dim=1)


def _unpack(messages_SB: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x_SD = messages_SB[:, :-_EXPERT_BYTES].contiguous().view(dtype)
    # A copy even of a single row, which is contiguous already: its bytes may begin where no int64 can.
    expert_SB = messages_SB[:, -_EXPERT_BYTES:].clone(memory_format=torch.contiguous_format)
    return x_SD, expert_SB.view(torch.int64).squeeze(1)


def _new_group(store: Any, index: int, size: int, host: str, device: torch.device, timeout: timedelta) -> Any:
    # The backend itself, not torch.distributed's world of groups: an epoch's group must come and go by itself.
    if device.type == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return dist.ProcessGroupNCCL(store, index, size, nccl)
    gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    gloo._timeout = timeout
    gloo._threads = 1
    return dist.ProcessGroupGloo(store, index, size, gloo)


def _outlive(group: Any, work: Any) -> None:
    """Keep a group until what is under way in it has failed."""
    with suppress(RuntimeError):
        work.wait()


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ExchangeError(f"exchange failed: {error}") from error
