"""What each row may see, read back from the tensors and compared with the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.block_pool import KVBlocks
from workers.scheduler import Scheduled
from workers.sequence import SamplingParams, Sequence
from workers.step_inputs import AttentionInputs, StepInputs

CPU = torch.device("cpu")


def seen_by_rows(inputs: AttentionInputs, rows: int, size: int) -> list[list[int]]:
    """Slots that each row attends to, in order."""
    seen: list[list[int]] = [[] for _ in range(rows)]

    def slots(blocks: list[int]) -> list[int]:
        return [block * size + offset for block in blocks for offset in range(size)]

    for row, blocks, visible in zip(
        inputs.single_B.tolist(), inputs.blocks_BM.tolist(), inputs.visible_BL.tolist(), strict=True
    ):
        assert not seen[row]
        seen[row] = [slot for slot, is_visible in zip(slots(blocks), visible, strict=True) if is_visible]
    for segment in inputs.long:
        keys = slots(segment.blocks.tolist())[segment.skip : segment.skip + segment.num_keys]
        assert len(keys) == segment.num_keys
        queries = range(rows)[segment.rows]
        assert len(queries) > 1
        for number, row in enumerate(queries):
            assert not seen[row]
            # Causal, with the last query at the last key.
            seen[row] = keys[: segment.num_keys - len(queries) + number + 1]
    return seen


@given(
    size=st.integers(1, 9),
    chunk=st.integers(1, 30),
    runs=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 50)), min_size=1, max_size=5),
)
@settings(max_examples=120)
def test_every_row_sees_what_it_should(size: int, chunk: int, runs: list[tuple[int, int]]) -> None:
    blocks = KVBlocks(2000, 2000, size, chunk)
    plan = []
    # Slot to (sequence, position), for either pool.
    holds: dict[str, dict[int, tuple[int, int]]] = {"global_": {}, "local": {}}
    for number, (start, count) in enumerate(runs):
        # Every other one has a token more than the step computes, so that it draws none.
        tokens = [1000 * number + position for position in range(start + count + number % 2)]
        prompt = max(1, len(tokens) // 2)
        sequence = Sequence(("a", number), tokens[:prompt], SamplingParams(), 99, output_ids=tokens[prompt:])
        # Grown in two strides, so that blocks of several sequences interleave; trimmed as the scheduler does.
        assert blocks.grow(sequence.blocks, start)
        blocks.trim(sequence.blocks, start)
        plan.append(Scheduled(sequence, start, start + count))
    for number, item in enumerate(plan):
        assert blocks.grow(item.sequence.blocks, item.end)
        for name, slots in holds.items():
            table = getattr(item.sequence.blocks, name)
            for position in range(table.first * size, item.end):
                slots[table.blocks[position // size - table.first] * size + position % size] = (number, position)

    inputs = StepInputs(plan, size, chunk, CPU)

    rows = [(number, position) for number, item in enumerate(plan) for position in range(item.start, item.end)]
    assert inputs.token_T.tolist() == [1000 * number + position for number, position in rows]
    assert inputs.position_T.tolist() == [position for _, position in rows]
    for attention, slots, first in (
        (inputs.global_, holds["global_"], lambda position: 0),
        (inputs.local, holds["local"], lambda position: position // chunk * chunk),
    ):
        assert [slots[slot] for slot in attention.slot_T.tolist()] == rows
        for (number, position), seen in zip(rows, seen_by_rows(attention, len(rows), size), strict=True):
            assert [slots[slot] for slot in seen] == [(number, key) for key in range(first(position), position + 1)]
    for attention in (inputs.global_rows, inputs.local_rows):
        # The same for the kernels: each row walks its table from the first position it sees.
        slots = holds["local" if attention is inputs.local_rows else "global_"]
        for row, (number, position) in enumerate(rows):
            table = attention.tables_SM[attention.sequence_T[row]].tolist()
            given_back = attention.first_block_S[attention.sequence_T[row]]
            for key in range(attention.first_T[row], position + 1):
                assert slots[table[key // size - given_back] * size + key % size] == (number, key)
            assert slots[attention.slot_T[row]] == (number, position)
    assert inputs.output_rows is None
    wanted = [range(item.end - number % 2, item.end) for number, item in enumerate(plan)]
    some = StepInputs(plan, size, chunk, CPU, wanted).output_rows
    expected = [row for row, (number, position) in enumerate(rows) if position in wanted[number]]
    assert expected == (list(range(len(rows))) if some is None else some.tolist())


def test_a_run_over_chunks_is_cut_at_their_ends() -> None:
    blocks = KVBlocks(20, 20, 4, 10)
    sequence = Sequence(("a", 1), list(range(31)), SamplingParams(), 5)
    assert blocks.grow(sequence.blocks, 31)
    inputs = StepInputs([Scheduled(sequence, 8, 31)], 4, 10, CPU)
    cut = [(segment.rows.start, segment.rows.stop, segment.skip, segment.num_keys) for segment in inputs.local.long]
    # Positions 8-9 see from 0 (in block 0), 10-19 from 10 (2 into block 2), 20-29 from 20; 30 sees itself alone.
    assert cut == [(0, 2, 0, 10), (2, 12, 2, 10), (12, 22, 0, 10)]
    assert inputs.local.single_B.tolist() == [22]
    assert inputs.local.visible_BL.tolist() == [[False, False, True, False]]
    (whole,) = inputs.global_.long
    assert (whole.rows, whole.skip, whole.num_keys) == (slice(0, 23), 0, 31)


def test_a_rank_without_work_has_no_rows() -> None:
    inputs = StepInputs([], 4, 10, CPU)
    assert inputs.token_T.shape == (0,)
    assert inputs.output_rows is None
    for attention in (inputs.global_, inputs.local):
        assert not attention.long
        assert len(attention.slot_T) == len(attention.single_B) == 0


@pytest.mark.parametrize(("start", "end"), [(0, 3), (2, 5), (3, 3), (3, 7), (6, 7)])
def test_tokens_of_a_sequence(start: int, end: int) -> None:
    sequence = Sequence(("a", 1), [10, 11, 12], SamplingParams(), 9, output_ids=[13, 14, 15, 16])
    assert sequence.tokens(start, end) == list(range(10 + start, 10 + end))
