"""Dispatch and combine: token rows to the processes that hold their experts, and back.

Shape suffixes: R rows this process sends (a token once an expert it chose), S rows it receives, D hidden size,
N processes, E logical experts.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

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
    the mode of transport. Totals count what left this process for another.

    Raises:
        ExchangeError: a peer did not answer in time or its connection broke (every method but `close`).
    """

    size: int
    """Processes."""
    index: int
    """This process, 0 to size - 1."""
    rows_sent: int = 0
    """Token rows sent to other processes since the start."""
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0
    """Time spent in dispatch and combine since the start, waiting for peers included."""

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
    def close(self) -> None:
        """Leave the group. Never waits for peers."""


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

    def close(self) -> None:
        pass
