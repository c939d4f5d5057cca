"""From the scheduler's plan to tensors: which rows are computed, where their keys go, what they may see.

A *segment* is a run of query positions of one sequence that see the same first key. Global layers have one a sequence;
local layers one a chunk that the run touches. Within a segment attention is plainly causal, so no mask over the context
is ever built for the chunks.

Shape suffixes: T rows of the step, B segments of one query row, M blocks of the longest of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.block_pool import BlockTable
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


@dataclass(frozen=True)
class StepInputs:
    """Everything a step computes with."""

    token_T: Tensor
    position_T: Tensor
    global_: AttentionInputs
    local: AttentionInputs
    sample_rows: Tensor
    """Rows whose logits are wanted, in the order of the plan's sampling sequences, int64."""


def step_inputs(plan: Sequence[Scheduled], block_size: int, chunk_size: int, device: torch.device) -> StepInputs:
    """Lay out the rows of `plan` in its order."""
    tokens: list[int] = []
    positions: list[int] = []
    sample_rows: list[int] = []
    for item in plan:
        tokens += item.sequence.tokens(item.start, item.end)
        positions += range(item.start, item.end)
        if item.samples:
            sample_rows.append(len(tokens) - 1)
    return StepInputs(
        token_T=torch.tensor(tokens, dtype=torch.int64, device=device),
        position_T=torch.tensor(positions, dtype=torch.int64, device=device),
        global_=_attention_inputs(plan, None, block_size, device),
        local=_attention_inputs(plan, chunk_size, block_size, device),
        sample_rows=torch.tensor(sample_rows, dtype=torch.int64, device=device),
    )


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
    plan: Sequence[Scheduled], chunk_size: int | None, block_size: int, device: torch.device
) -> AttentionInputs:
    slots: list[int] = []
    single: list[tuple[int, BlockTable, int, int]] = []
    long: list[LongSegment] = []
    for item in plan:
        table = item.sequence.blocks.global_ if chunk_size is None else item.sequence.blocks.local
        base = len(slots) - item.start
        slots += [
            table.blocks[position // block_size - table.first] * block_size + position % block_size
            for position in range(item.start, item.end)
        ]
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
    blocks_BM, visible_BL = _single_rows(single, block_size)
    return AttentionInputs(
        slot_T=torch.tensor(slots, dtype=torch.int64, device=device),
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
