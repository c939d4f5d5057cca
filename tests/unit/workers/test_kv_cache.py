"""KV memory is split between the pools and never exceeded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoints import MAVERICK
from tests.exactness import Written
from tests.local_engine import LocalRank, engine_config
from workers.config import EngineConfig
from workers.errors import UserError
from workers.kv_cache import KVCache, pool_sizes
from workers.model_config import ModelConfig
from workers.runner import resolve_device


def model(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({**MAVERICK, "model_type": "llama4_text", **changes})


def engine(memory: int, block_size: int = 16, budget: int = 64, seqs: int = 8) -> EngineConfig:
    return EngineConfig(
        Path("/"), kv_memory_bytes=memory, block_size=block_size, max_num_batched_tokens=budget, max_num_seqs=seqs
    )


@given(
    memory=st.integers(1, 2**24),
    block_size=st.integers(1, 64),
    budget=st.integers(8, 300),
    seqs=st.integers(1, 8),
    layers=st.lists(st.integers(0, 1), min_size=8, max_size=8),
    item_bytes=st.sampled_from([2, 4]),
)
def test_pools_use_the_memory_they_are_given(
    memory: int, block_size: int, budget: int, seqs: int, layers: list[int], item_bytes: int
) -> None:
    config = model(no_rope_layers=layers)
    one = 2 * config.num_kv_heads * config.head_dim * item_bytes * block_size
    if memory < 8 * one:
        with pytest.raises(UserError, match="holds no block"):
            pool_sizes(config, engine(memory, block_size, budget, seqs), item_bytes)
        return
    sizes = pool_sizes(config, engine(memory, block_size, budget, seqs), item_bytes)
    used = one * (sizes.num_global * (8 - sum(layers)) + sizes.num_local * sum(layers))
    assert sizes.num_global >= 1
    assert sizes.num_local >= 1
    assert used <= memory
    # Nothing is left that could have been a block of both, or of the global ones where the local ones are enough.
    enough = seqs * (-(-(config.chunk_size + budget) // block_size) + 1)
    assert sizes.num_local <= max(sizes.num_global, enough)
    if sizes.num_local < enough or not any(layers):
        assert sizes.num_local == sizes.num_global or not any(layers)
        assert memory - used < 8 * one
    elif sum(layers) < 8:
        assert memory - used < (8 - sum(layers)) * one


def test_local_layers_leave_the_memory_to_global_ones() -> None:
    """Past a chunk only a quarter of the layers grow: four times the context of layers that all keep everything."""
    config = model(attention_chunk_size=64)
    sizes = pool_sizes(config, engine(2**24, seqs=1), 4)
    all_global = pool_sizes(model(no_rope_layers=[0] * 8), engine(2**24, seqs=1), 4)
    assert sizes.num_global > 3.9 * all_global.num_global


def test_the_cache_has_a_tensor_for_every_layer() -> None:
    config = model()
    sizes = pool_sizes(config, engine(2**20), 2)
    cache = KVCache(config, sizes, 16, torch.bfloat16, torch.device("cpu"))
    assert len(cache.layers) == 8
    for (keys, values), is_local in zip(cache.layers, config.rope_layers, strict=True):
        blocks = sizes.num_local if is_local else sizes.num_global
        assert keys.shape == values.shape == (blocks, 16, 2, 16)
        assert keys.dtype == torch.bfloat16
    assert sum(keys.nbytes + values.nbytes for keys, values in cache.layers) <= 2**20


def test_memory_for_no_block() -> None:
    with pytest.raises(UserError, match=r"kv_memory_bytes: 1000 holds no block of 16 tokens \(32768 bytes\)"):
        pool_sizes(model(), engine(1000), 4)


def test_max_model_len(maverick: Written) -> None:
    one_block = 8 * 2 * 2 * 16 * 4 * 16
    fits = LocalRank(engine_config(maverick.folder, kv_memory_bytes=10 * one_block, max_num_seqs=1)).runner
    # 80 layer-blocks: 8 local blocks in 6 layers are enough for ever, which leaves 16 global ones in 2 layers.
    assert (fits.blocks.local.num_blocks, fits.max_model_len) == (8, 16 * 16)
    assert LocalRank(engine_config(maverick.folder, max_model_len=99)).runner.max_model_len == 99
    assert LocalRank(engine_config(maverick.folder, kv_memory_bytes=2**26)).runner.max_model_len == 4096
    with pytest.raises(UserError, match="max_model_len: 4097 is past the checkpoint's context of 4096"):
        LocalRank(engine_config(maverick.folder, max_model_len=4097))
    with pytest.raises(UserError, match="max_model_len: 4000 tokens do not fit the KV pools, which hold"):
        LocalRank(engine_config(maverick.folder, max_model_len=4000, kv_memory_bytes=10 * one_block))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dtype": "float16"}, "dtype: 'float16' is not one of auto, float32, bfloat16"),
        ({"device": "tpu"}, "device: 'tpu' is not one of auto, cpu, cuda"),
        ({"block_size": 0}, "block_size: must be at least 1, got 0"),
        ({"kv_memory_bytes": -1}, "kv_memory_bytes: must be at least 1, got -1"),
        ({"prefill_step_ratio": 1.0}, "prefill_step_ratio: must be more than 1, .*, or 0 for no bound; got 1.0"),
        ({"prefill_step_ratio": float("nan")}, "prefill_step_ratio: must be more than 1"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens: must be at least 1, got 0"),
        (
            {"max_num_seqs": 9, "max_num_batched_tokens": 8},
            r"max_num_seqs: 9 is more than max_num_batched_tokens \(8\)",
        ),
    ],
)
def test_configurations_that_cannot_be(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        EngineConfig(Path("/"), **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has CUDA")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(UserError, match="device: cuda is asked for, but this host has no CUDA device"):
        resolve_device("cuda")
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
