"""Which key positions each row of a step sees, and where its own goes: as arrays, made without a loop over tokens.

Shape suffixes: T rows of the step, S sequences of the step, M blocks of the longest of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.block_pool import BlockTable
from workers.scheduler import Scheduled

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PagedRows:
    """A step's rows for the layers of one kind (global or local)."""

    slot_T: Integers
    """Where each row's key and value are stored: block · block size + offset."""
    position_T: Integers
    """Each row's position, the last that it sees."""
    first_T: Integers
    """The first position that it sees."""
    sequence_T: Integers
    """Row of `tables_SM` that has its blocks."""
    first_block_S: Integers
    """Leading blocks of the sequence that were given back: entry m of its table is block first_block + m."""
    tables_SM: npt.NDArray[np.int32]
    """Block tables, padded with 0."""


def paged_rows(plan: Sequence[Scheduled], chunk_size: int, block_size: int) -> tuple[PagedRows, PagedRows]:
    """Rows of `plan` in its order, as global layers and as local ones see them."""
    start_S = np.array([item.start for item in plan], dtype=np.int64)
    count_S = np.array([item.end for item in plan], dtype=np.int64) - start_S
    sequence_T = np.repeat(np.arange(len(plan)), count_S)
    row_S = np.cumsum(count_S) - count_S
    position_T = np.arange(len(sequence_T)) + (start_S - row_S)[sequence_T]

    def seen_through(tables: list[BlockTable], first_T: Integers) -> PagedRows:
        first_block_S = np.array([table.first for table in tables], dtype=np.int64)
        tables_SM = np.zeros((len(plan), max((len(table.blocks) for table in tables), default=0)), dtype=np.int32)
        for row, table in enumerate(tables):
            tables_SM[row, : len(table.blocks)] = table.blocks
        block_T = tables_SM[sequence_T, position_T // block_size - first_block_S[sequence_T]]
        slot_T = block_T.astype(np.int64) * block_size + position_T % block_size
        return PagedRows(slot_T, position_T, first_T, sequence_T, first_block_S, tables_SM)

    return (
        seen_through([item.sequence.blocks.global_ for item in plan], np.zeros_like(position_T)),
        seen_through([item.sequence.blocks.local for item in plan], position_T // chunk_size * chunk_size),
    )
