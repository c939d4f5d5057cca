"""The same greedy tokens with and without the prefix cache, from the real model, whatever is shared or evicted."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from tests.exactness import Exactness, Written
from tests.local_engine import LocalRank, engine_config, greedy, prompt
from workers.inbox import Abort, Add
from workers.kv_table import KVShape, table_bytes
from workers.sequence import SamplingParams, Sequence

# Bytes of one token in all 8 layers of the small checkpoints.
TOKEN = 8 * 2 * 2 * 16 * 4
CHUNK = 37


def cached_and_not(
    written: Written, requests: list[tuple[list[int], int]], **config: int
) -> tuple[LocalRank, list[list[int]]]:
    """Outputs with the cache, one request after another, each equal to the one without; and the rank that had it."""
    cached = LocalRank(engine_config(written.folder, **config))
    plain = LocalRank(engine_config(written.folder, prefix_cache=False, **config))
    outputs = []
    for number, (ids, count) in enumerate(requests):
        (output,) = cached.generate([greedy(number, ids, count)])
        assert [output] == plain.generate([greedy(number, ids, count)]), f"request {number}"
        outputs.append(output)
    assert plain.scheduler.prefix_hit_tokens == 0
    return cached, outputs


@pytest.mark.parametrize("block_size", [1, 4, 16, 37, 50])
@pytest.mark.parametrize("model", ["maverick", "scout"])
def test_prefixes_that_end_around_a_chunk(
    model: str, block_size: int, request: pytest.FixtureRequest, exactness: Exactness
) -> None:
    written: Written = request.getfixturevalue(model)
    whole = prompt(7, 130)
    lengths = [130, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 100, 130]
    # The same beginning, then a token of its own: the last tokens that can be shared lie around the chunk's border.
    requests = [([*whole[:length], 3 + number], 6) for number, length in enumerate(lengths)]
    rank, outputs = cached_and_not(written, requests, block_size=block_size)
    want = sum(length // block_size * block_size for length in lengths[1:])
    assert rank.scheduler.prefix_hit_tokens == want
    for (ids, _), output in zip(requests, outputs, strict=True):
        exactness.check(written.reference, ids, output, f"{len(ids)} tokens in blocks of {block_size}")


def test_a_conversation_goes_on(maverick: Written, exactness: Exactness) -> None:
    """Each turn's prompt is all that was said before, outputs included."""
    rank = LocalRank(engine_config(maverick.folder, block_size=8))
    ids: list[int] = []
    for turn in range(6):
        ids = ids + prompt(turn, 20)
        sequence = greedy(turn, ids, 11)
        (output,) = rank.generate([sequence])
        exactness.check(maverick.reference, ids, output, f"turn {turn}")
        assert sequence.num_cached_tokens == (len(ids) - 21) // 8 * 8 * (turn > 0)
        ids = ids + output


def test_pools_too_small_for_what_they_keep(maverick: Written, exactness: Exactness) -> None:
    """Prefixes are evicted and computed anew while others run; several at once, so that some are preempted."""
    chance = random.Random(3)
    families = [prompt(seed, 120) for seed in range(4)]
    rank = LocalRank(engine_config(maverick.folder, kv_memory_bytes=260 * TOKEN, block_size=4, max_num_seqs=6))
    waves = []
    for wave in range(6):
        sequences = []
        for number in range(6):
            ids = families[chance.randrange(4)][: chance.randrange(10, 120)] + prompt(100 * wave + number, 3)
            sequences.append(greedy(100 * wave + number, ids, chance.randrange(1, 40)))
        rank.generate(sequences)
        waves += sequences
    assert rank.scheduler.num_preemptions > 0
    assert rank.runner.blocks.global_.num_evictions > 0
    assert rank.scheduler.prefix_hit_tokens > 200
    for sequence in waves:
        exactness.check(maverick.reference, sequence.prompt_ids, sequence.output_ids, str(sequence.key))


def test_prompt_logprobs_with_a_cached_prompt(maverick: Written) -> None:
    ids = prompt(5, 90)
    rank = LocalRank(engine_config(maverick.folder))
    rank.generate([greedy(1, ids, 2)])
    emitted = []
    for number in (2, 3):
        rank.inbox.put(Add(Sequence(("a", number), ids, SamplingParams(prompt_logprobs=2), 2)))
        rank.emitted.clear()
        while rank.engine.step():
            pass
        emitted.append(next(item for _, items in rank.emitted for item in items))
    for item in emitted:
        assert len(item.prompt_logprobs) == 89
        assert (item.is_first, item.sequence.num_cached_tokens) == (True, 0)


def test_a_replayed_stream_finds_its_prompt_and_its_output(maverick: Written, exactness: Exactness) -> None:
    rank = LocalRank(engine_config(maverick.folder, block_size=8))
    ids = prompt(9, 50)
    (whole,) = rank.generate([greedy(1, ids, 30)])
    again = greedy(2, ids, 30, output_ids=whole[:20])
    assert rank.generate([again]) == [whole]
    assert again.num_cached_tokens == 64
    exactness.check(maverick.reference, ids, whole, "replayed")


def test_hits_are_counted(maverick: Written) -> None:
    rank = LocalRank(engine_config(maverick.folder, block_size=8), gang="prefixes")
    labels = {"gang": "prefixes", "rank": "0"}
    for number in (1, 2, 3):
        rank.inbox.put(Add(greedy(number, prompt(1, 60), 4)))
        while rank.engine.step():
            pass
    counted = {
        name: REGISTRY.get_sample_value(f"caravan_prefix_{name}_tokens_total", labels) for name in ("lookup", "hit")
    }
    assert counted == {"lookup": 180, "hit": 2 * 56}
    for pool in ("global", "local"):
        blocks = REGISTRY.get_sample_value("caravan_prefix_cached_blocks", {**labels, "pool": pool})
        assert blocks == 7, "63 tokens were computed of each"


@given(
    block_size=st.integers(1, 24),
    blocks=st.integers(0, 40),
    budget=st.integers(8, 64),
    data=st.data(),
)
@settings(max_examples=12, deadline=None)
def test_random_crowds(
    maverick: Written, exactness: Exactness, block_size: int, blocks: int, budget: int, data: st.DataObject
) -> None:
    """Adds, steps, aborts, preemption and eviction at random."""
    memory = max(100, blocks * block_size) // block_size * block_size * TOKEN
    rank = LocalRank(
        engine_config(
            maverick.folder,
            kv_memory_bytes=memory + block_size * TOKEN,
            block_size=block_size,
            max_num_batched_tokens=budget,
            max_num_seqs=4,
        )
    )
    sequences, aborted = [], set()
    for number in range(8):
        common = data.draw(st.integers(0, 70), label="in common")
        ids = prompt(data.draw(st.integers(0, 1), label="family"), 70)[:common] + prompt(number + 10, 8)
        sequences.append(greedy(number, ids, data.draw(st.integers(1, 12), label="output")))
        rank.inbox.put(Add(sequences[-1]))
        for _ in range(data.draw(st.integers(0, 5), label="steps")):
            rank.engine.step()
            rank.scheduler.check_integrity()
        if data.draw(st.integers(0, 3), label="abort") == 0:
            victim = data.draw(st.sampled_from(sequences))
            aborted.add(victim.key)
            rank.inbox.put(Abort(victim.key))
    while rank.engine.step():
        rank.scheduler.check_integrity()
    rank.scheduler.check_integrity()
    assert rank.runner.blocks.usage_ratio == 0
    for sequence in sequences:
        assert sequence.key in aborted or len(sequence.output_ids) == sequence.max_tokens
        if sequence.output_ids:
            exactness.check(maverick.reference, sequence.prompt_ids, sequence.output_ids, str(sequence.key))


@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_memory_held_is_what_the_table_says(maverick: Written, block_size: int) -> None:
    """The table of KV memory, counted from the pools as a sequence grows past its chunks."""
    rank = LocalRank(engine_config(maverick.folder, block_size=block_size, max_num_batched_tokens=16))
    shape = KVShape.of(rank.model)
    rank.scheduler.add(greedy(1, prompt(1, 200), 30))
    blocks, most_local = rank.runner.blocks, 0
    while plan := rank.scheduler.plan():
        (item,) = plan
        rank.scheduler.commit(plan, rank.runner.execute(plan))
        if not rank.scheduler.num_running:
            break
        held = [pool.num_blocks - pool.num_free for pool in (blocks.global_, blocks.local)]
        tokens = item.sequence.num_computed_tokens
        layers = (shape.num_layers - shape.num_local_layers, shape.num_local_layers)
        counted = sum(h * n for h, n in zip(held, layers, strict=True)) * block_size * shape.token_bytes(4)
        told = table_bytes(shape, tokens, item_bytes=4)
        # Blocks are whole: a part of one more at the end, and of one at the chunk's beginning.
        slack = (layers[0] + 2 * layers[1]) * (block_size - 1) * shape.token_bytes(4)
        assert counted <= told + slack
        assert held[0] == -(-tokens // block_size)
        assert held[1] == held[0] - tokens // CHUNK * CHUNK // block_size
        most_local = max(most_local, held[1])
    assert most_local * block_size >= CHUNK - 1, "the table's number is reached at a chunk's end"
