"""KV memory: one pool of blocks for the global layers, one for the local ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.config import EngineConfig
from workers.errors import UserError
from workers.model_config import ModelConfig


@dataclass(frozen=True)
class PoolSizes:
    """Blocks in each pool."""

    num_global: int
    num_local: int


def pool_sizes(model: ModelConfig, engine: EngineConfig, item_bytes: int) -> PoolSizes:
    """Split the KV memory between the pools.

    Up to a chunk a sequence needs as many local as global blocks; past it the local ones stop growing. So the local
    pool is as large as the global one, or as `max_num_seqs` sequences could ever fill, whichever is less.

    Raises:
        UserError: the memory does not hold a single block.
    """
    block = 2 * model.num_kv_heads * model.head_dim * item_bytes * engine.block_size
    local_layers = sum(model.rope_layers)
    global_block, local_block = block * (model.num_layers - local_layers), block * local_layers
    most_local = engine.max_num_seqs * (-(-(model.chunk_size + engine.max_num_batched_tokens) // engine.block_size) + 1)
    blocks = engine.kv_memory_bytes // (global_block + local_block)
    if blocks > most_local and global_block:
        return PoolSizes((engine.kv_memory_bytes - most_local * local_block) // global_block, most_local)
    if blocks < 1:
        raise UserError(
            f"kv_memory_bytes: {engine.kv_memory_bytes} holds no block of {engine.block_size} tokens "
            f"({global_block + local_block} bytes); give it more"
        )
    return PoolSizes(blocks, blocks)


class KVCache:
    """Keys and values of every layer, each [blocks, block size, kv heads, head dim]."""

    def __init__(
        self, model: ModelConfig, sizes: PoolSizes, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (block_size, model.num_kv_heads, model.head_dim)
        self.layers: list[tuple[Tensor, Tensor]] = []
        for is_local in model.rope_layers:
            blocks = sizes.num_local if is_local else sizes.num_global
            # Zeroed, not empty: masked positions are multiplied by 0, and 0 · NaN is NaN.
            keys, values = (torch.zeros(blocks, *shape, dtype=dtype, device=device) for _ in range(2))
            self.layers.append((keys, values))
