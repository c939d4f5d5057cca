"""Dispatch and combine: token rows to the processes that hold their experts, and back.

Shape suffixes: R rows this process sends (a token once an expert it chose), S rows it receives, D hidden size,
N processes, E logical experts.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.errors import ExchangeError
from workers.prompt_limit import StepWork


@dataclass(frozen=True)
class Dispatched:
    """Rows that arrived, and what combine needs to send their results home."""

    x_SD: Tensor
    expert_S: Tensor
    """Logical expert of each row, int64."""
    home: Any
    """The exchange's own: which way the rows came."""


class Exchange(ABC):
    """The tensor plane of one epoch. All processes make the same calls in the same order.

    Contract: `combine(f(dispatch(x))) == f(x)` row for row, for every f that works row by row; results do not depend on
    the mode of transport. Totals count what left this process for another, or came from one.

    Raises:
        ExchangeError: a peer did not answer in time, its connection broke, or the exchange was aborted (every method
            but `abort` and `close`). The exchange is of no more use then: close it.
    """

    size: int
    """Processes."""
    index: int
    """This process, 0 to size - 1."""
    rows_sent: int = 0
    """Token rows sent to other processes since the start."""
    bytes_within_host: int = 0
    """Sent to processes of the same host."""
    bytes_between_hosts: int = 0
    """Sent to processes of other hosts."""
    received_within_host: int = 0
    received_between_hosts: int = 0
    seconds: float = 0.0
    """Time spent in dispatch and combine since the start, waiting for peers included."""

    @property
    def bytes_sent(self) -> int:
        return self.bytes_within_host + self.bytes_between_hosts

    @property
    def bytes_received(self) -> int:
        return self.received_within_host + self.received_between_hosts

    @abstractmethod
    def agree(self, work: StepWork) -> list[StepWork]:
        """Open a step: what each process computes in it."""

    @abstractmethod
    def dispatch(self, x_RD: Tensor, process_R: Tensor, expert_R: Tensor) -> Dispatched:
        """Send row r, for logical expert `expert_R[r]` (int64), to process `process_R[r]` (int64)."""

    @abstractmethod
    def combine(self, y_SD: Tensor, dispatched: Dispatched) -> Tensor:
        """Send results of the received rows home; returns [R, D] in the order dispatch was given."""

    @abstractmethod
    def abort(self) -> None:
        """Give up: the call under way, if there is one, and all later ones raise ExchangeError within milliseconds, and
        so do those of peers that wait for this process. From any thread, at any time, again and again. Never waits."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group, with no call under way; again, it does nothing. Never waits for peers: those that have all
        they need of this process finish their call."""


class LocalExchange(Exchange):
    """One process that holds every expert: nothing to send."""

    size = 1
    index = 0

    def agree(self, work: StepWork) -> list[StepWork]:
        return [work]

    def dispatch(self, x_RD: Tensor, process_R: Tensor, expert_R: Tensor) -> Dispatched:
        return Dispatched(x_RD, expert_R, None)

    def combine(self, y_SD: Tensor, dispatched: Dispatched) -> Tensor:
        return y_SD

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


def check_exchange(exchange: Exchange, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """The first exchange of a group: a row from every process to every other one, and back. All of them call it.

    Raises:
        ExchangeError: a peer did not answer, or other rows came back than were sent.
    """
    exchange.agree(StepWork(decode_tokens=exchange.size))
    process_R = torch.arange(exchange.size, dtype=torch.int64, device=device)
    x_RD = (process_R + 1 + exchange.index).to(dtype)[:, None].expand(-1, dim).contiguous()
    dispatched = exchange.dispatch(x_RD, process_R, process_R)
    if not torch.equal(exchange.combine(dispatched.x_SD, dispatched), x_RD):
        raise ExchangeError("the first exchange brought other rows back than were sent")
