"""KV memory: the table's numbers, and a sequence as long as the models' contexts in tables, schedules and positions."""

import time

import pytest
import torch

from tests.checkpoints import MAVERICK, SCOUT
from tests.unit.workers.test_step_inputs import CPU
from workers.attention import temperature
from workers.block_pool import KVBlocks
from workers.config import EngineConfig
from workers.kv_cache import pool_sizes
from workers.kv_table import LLAMA4, KVShape, markdown, table_bytes
from workers.model_config import ModelConfig
from workers.rope import inverse_frequencies, rotations
from workers.scheduler import Scheduler
from workers.sequence import Sample, SamplingParams, Sequence
from workers.step_inputs import StepInputs

GIB = 2**30
M = 2**20
CHUNK = 8192
PUBLISHED = {
    "hidden_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_chunk_size": CHUNK,
    "floor_scale": CHUNK,
    "attn_scale": 0.1,
}


def published(base: dict, context: int) -> ModelConfig:
    return ModelConfig.from_dict({**base, **PUBLISHED, "model_type": "llama4_text", "max_position_embeddings": context})


def test_the_table() -> None:
    for shape in (LLAMA4, KVShape.of(published(MAVERICK, M)), KVShape.of(published(SCOUT, 10 * M))):
        assert shape.token_bytes(2) == 4096, "4 KiB a token and layer"
        assert table_bytes(shape, M, frees_local=False) == 192 * GIB
        assert table_bytes(shape, M) == 49.125 * GIB
        assert table_bytes(shape, CHUNK) == table_bytes(shape, CHUNK, frees_local=False) == 1.5 * GIB
        assert table_bytes(shape, 2**17, frees_local=False) == 24 * GIB
        assert table_bytes(shape, 2**17) == 7.125 * GIB
        assert table_bytes(shape, 10 * M, frees_local=False) == 1920 * GIB
        assert table_bytes(shape, 10 * M) == 481.125 * GIB
    assert "| 1M (Maverick) | 192 GiB | 49.12 GiB | 3.9× less |" in markdown().splitlines()


@pytest.mark.parametrize("tokens", [M, 10 * M])
@pytest.mark.parametrize("block_size", [16, 24])
def test_pools_that_hold_the_context_are_as_large_as_the_table_says(tokens: int, block_size: int) -> None:
    model = published(MAVERICK, tokens)
    engine = EngineConfig(
        "/",  # type: ignore[arg-type]
        kv_memory_bytes=int(table_bytes(LLAMA4, tokens) * 1.01),
        block_size=block_size,
        max_num_seqs=1,
    )
    sizes = pool_sizes(model, engine, 2)
    blocks = KVBlocks(sizes.num_global, sizes.num_local, block_size, CHUNK)
    assert blocks.longest(engine.max_num_batched_tokens) >= tokens


class Long:
    """One sequence of the model's context at the pace of real steps, without KV tensors or model."""

    def __init__(self, tokens: int, block_size: int, budget: int, output: int = 3) -> None:
        self.tokens, self.block_size = tokens, block_size
        num_local = -(-(CHUNK + budget) // block_size) + 2
        self.blocks = KVBlocks(tokens // block_size + 2, num_local, block_size, CHUNK)
        self.scheduler = Scheduler(self.blocks, budget, 4)
        self.ids = [position % 50_000 for position in range(tokens - output)]
        self.sequence = self.add(1, output)

    def add(self, number: int, output: int) -> Sequence:
        sequence = Sequence(("a", number), self.ids, SamplingParams(), output)
        self.scheduler.add(sequence)
        return sequence

    def finish(self) -> list[tuple[int, int]]:
        """Start and end of each step."""
        steps = []
        while plan := self.scheduler.plan():
            (item,) = plan
            steps.append((item.start, item.end))
            if (
                item.start // CHUNK != item.end // CHUNK and item.start // CHUNK % 16 == 0
            ) or item.end >= self.tokens - 3:
                self.check(item.start, item.end, StepInputs(plan, self.block_size, CHUNK, CPU))
            self.scheduler.commit(plan, [Sample(7) for item in plan if item.samples])
            assert self.blocks.local.num_blocks >= len(self.sequence.blocks.local.blocks)
        self.scheduler.check_integrity()
        assert self.blocks.usage_ratio == 0
        return steps

    def check(self, start: int, end: int, inputs: StepInputs) -> None:
        """Positions, slots and visible keys are the definition's, at the first and last row of the step."""
        assert inputs.position_T.tolist() == list(range(start, end))
        tables = self.sequence.blocks
        for rows, table, first in (
            (inputs.global_rows, tables.global_, lambda position: 0),
            (inputs.local_rows, tables.local, lambda position: position // CHUNK * CHUNK),
        ):
            for row in (0, end - start - 1):
                position = start + row
                block = table.blocks[position // self.block_size - table.first]
                assert rows.slot_T[row] == block * self.block_size + position % self.block_size
                assert rows.first_T[row] == first(position)
                # The first key it sees is there, too.
                assert first(position) // self.block_size >= table.first
        assert sum(segment.num_keys for segment in inputs.global_.long) in (0, end)


@pytest.mark.parametrize(("tokens", "block_size", "budget"), [(M, 16, 512), (M, 24, 700), (10 * M, 64, 4096)])
@pytest.mark.timeout(60)
def test_a_sequence_as_long_as_the_context(tokens: int, block_size: int, budget: int) -> None:
    long = Long(tokens, block_size, budget)
    began = time.process_time()
    steps = long.finish()
    assert [start for start, _ in steps[1:]] == [end for _, end in steps[:-1]]
    assert steps[-1][1] == tokens - 1
    assert len(steps) == -(-(tokens - 3) // budget) + 2
    assert len(long.sequence.output_ids) == 3
    # A second time, all but the last block is there: one step for what is left of the prompt.
    again = long.sequence = long.add(2, 2)
    assert len(long.finish()) == 2
    assert again.num_cached_tokens >= tokens - 3 - 2 * block_size
    # Nothing grows with the square of the length: that would be minutes.
    assert time.process_time() - began < 40


@pytest.mark.parametrize("base", [MAVERICK, SCOUT])
def test_positions_are_exact_at_the_end_of_the_context(base: dict) -> None:
    """Positions stay integers until they meet a float32, which holds each of them up to 2^24."""
    model = published(base, 10 * M)
    around = torch.cat([torch.arange(end - 9000, end) for end in (M, 10 * M)])
    assert torch.equal(around.float().long(), around)
    got = temperature(around, model)
    assert got is not None
    want = torch.log1p(torch.floor((around.double() + 1) / CHUNK)) * 0.1 + 1
    assert (got.flatten().double() - want).abs().max() < 3e-7
    # It steps where a chunk's last position is, as exact integers say.
    steps = got.flatten()[1:] != got.flatten()[:-1]
    assert torch.equal(steps, (around[1:] + 1) // CHUNK != (around[:-1] + 1) // CHUNK)


@pytest.mark.parametrize("base", [MAVERICK, SCOUT])
def test_rotations_are_the_references_at_the_end_of_the_context(base: dict) -> None:
    """The reference multiplies position and frequency in float32, so a rotation is off by up to half a unit in the last
    place of its angle: 0.03 at a million, 0.5 at ten. So is ours, to the bit, and no more than that."""
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding

    model = published(base, 10 * M)
    frequencies = inverse_frequencies(model)
    reference = Llama4TextRotaryEmbedding(Llama4TextConfig(**{**base, **PUBLISHED}))
    for end in (CHUNK, M, 10 * M):
        positions = torch.arange(end - 600, end)
        got = rotations(positions, frequencies)[:, 0]
        assert torch.equal(got, reference(torch.zeros(1), positions[None])[0])
        angles = positions.double()[:, None] * frequencies.double()
        assert angles.max() > end / 2
        off = (got.to(torch.complex128) - torch.polar(torch.ones_like(angles), angles)).abs()
        spacing = 2.0 ** (torch.floor(torch.log2(angles)) - 23)
        assert (off <= spacing / 2 * 1.01 + 3e-7).all()
