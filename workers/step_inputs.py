"""From the scheduler's plan to tensors: which rows are computed, where their keys go, what they may see.

A *segment* is a run of query positions of one sequence that see the same first key. Global layers have one a sequence;
local layers one a chunk that the run touches. Within a segment attention is plainly causal, so no mask over the context
is ever built for the chunks.

Shape suffixes: T rows of the step, B segments of one query row, M blocks of the longest of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from workers.block_pool import BlockTable
from workers.paged_rows import PagedRows, paged_rows
from workers.scheduler import Scheduled


@dataclass(frozen=True)
class LongSegment:
    """Several query rows of one sequence."""

    rows: slice
    """Rows of the step."""
    blocks: Tensor
    """Blocks that hold the keys, [m] int64."""
    skip: int
    """Positions in the first block before the first key."""
    num_keys: int
    """Keys from the first to the last query's own."""


@dataclass(frozen=True)
class AttentionInputs:
    """What the layers of one kind (global or local) need for a step."""

    slot_T: Tensor
    """Where each row's key and value are stored: block · block size + offset, int64."""
    single_B: Tensor
    """Rows that are a segment of their own (decoding), int64."""
    blocks_BM: Tensor
    """Their blocks, padded with block 0, int64."""
    visible_BL: Tensor
    """True where a position of those blocks may be seen, [B, M · block size] bool."""
    long: list[LongSegment]


class StepInputs:
    """Everything a step computes with. How rows see keys is in `global_rows` and `local_rows`, as the kernels take it;
    the eager layers' segments (`global_`, `local`) are laid out when they are asked for."""

    def __init__(
        self,
        plan: Sequence[Scheduled],
        block_size: int,
        chunk_size: int,
        device: torch.device,
        outputs: Sequence[range] | None = None,
    ) -> None:
        """
        Args:
            outputs: positions of each planned sequence whose hidden states are wanted, among those that the step
                computes; None: all of them.
        """
        self._plan, self._block_size, self._chunk_size, self._device = plan, block_size, chunk_size, device
        tokens: list[int] = []
        rows: list[int] = []
        for number, item in enumerate(plan):
            wanted = range(item.start, item.end) if outputs is None else outputs[number]
            first = len(tokens) - item.start
            rows += range(first + wanted.start, first + wanted.stop)
            tokens += item.sequence.tokens(item.start, item.end)
        self.token_T = torch.tensor(tokens, dtype=torch.int64, device=device)
        self.global_rows, self.local_rows = paged_rows(plan, chunk_size, block_size)
        self.position_T = torch.from_numpy(self.global_rows.position_T).to(device)
        self.output_rows = None
        """Rows whose hidden states are wanted, int64; None: all."""
        if len(rows) < len(tokens):
            self.output_rows = torch.tensor(rows, dtype=torch.int64, device=device)

    @cached_property
    def global_(self) -> AttentionInputs:
        return _attention_inputs(self._plan, self.global_rows, None, self._block_size, self._device)

    @cached_property
    def local(self) -> AttentionInputs:
        return _attention_inputs(self._plan, self.local_rows, self._chunk_size, self._block_size, self._device)


def _segments(start: int, end: int, chunk_size: int | None) -> Iterator[tuple[int, int, int]]:
    """(first query, past the last query, first key) of each segment."""
    if chunk_size is None:
        yield start, end, 0
        return
    while start < end:
        chunk_start = start // chunk_size * chunk_size
        stop = min(end, chunk_start + chunk_size)
        yield start, stop, chunk_start
        start = stop


def _attention_inputs(
    plan: Sequence[Scheduled], rows: PagedRows, chunk_size: int | None, block_size: int, device: torch.device
) -> AttentionInputs:
    base = 0
    single: list[tuple[int, BlockTable, int, int]] = []
    long: list[LongSegment] = []
    for item in plan:
        table = item.sequence.blocks.global_ if chunk_size is None else item.sequence.blocks.local
        base -= item.start
        for start, stop, first_key in _segments(item.start, item.end, chunk_size):
            if stop - start == 1:
                single.append((base + start, table, first_key, start))
                continue
            first_block = first_key // block_size - table.first
            blocks = table.blocks[first_block : -(-stop // block_size) - table.first]
            long.append(
                LongSegment(
                    rows=slice(base + start, base + stop),
                    blocks=torch.tensor(blocks, dtype=torch.int64, device=device),
                    skip=first_key % block_size,
                    num_keys=stop - first_key,
                )
            )
        base += item.end
    blocks_BM, visible_BL = _single_rows(single, block_size)
    return AttentionInputs(
        slot_T=torch.from_numpy(rows.slot_T).to(device),
        single_B=torch.tensor([row for row, *_ in single], dtype=torch.int64, device=device),
        blocks_BM=blocks_BM.to(device),
        visible_BL=visible_BL.to(device),
        long=long,
    )


def _single_rows(single: list[tuple[int, BlockTable, int, int]], block_size: int) -> tuple[Tensor, Tensor]:
    runs = []
    for _, table, first_key, position in single:
        runs.append(table.blocks[first_key // block_size - table.first : position // block_size + 1 - table.first])
    most = max(map(len, runs), default=0)
    blocks_BM = torch.tensor([run + [0] * (most - len(run)) for run in runs], dtype=torch.int64).view(len(runs), most)
    skip_B = torch.tensor([first_key % block_size for _, _, first_key, _ in single], dtype=torch.int64)
    last_B = skip_B + torch.tensor([position - first_key for _, _, first_key, position in single], dtype=torch.int64)
    place_L = torch.arange(most * block_size)
    return blocks_BM, (place_L >= skip_B[:, None]) & (place_L <= last_B[:, None])
