"""Executes a planned step: inputs, model, sampler."""

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from workers.block_pool import KVBlocks
from workers.config import EngineConfig
from workers.errors import UserError
from workers.exchange import Exchange
from workers.expert_map import ExpertMap
from workers.kv_cache import KVCache, pool_sizes
from workers.model import Llama4
from workers.model_config import ModelConfig
from workers.sampler import logprobs, sample
from workers.scheduler import Scheduled
from workers.sequence import Sample
from workers.step_inputs import step_inputs
from workers.weights import ModelWeights

# Rows of logits made at once for prompt log-probabilities: a row of the real vocabulary is 0.8 MB.
LOGITS_ROWS = 64
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one.

    Raises:
        UserError: CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda is asked for, but this host has no CUDA device; use auto or cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def resolve_dtype(engine: EngineConfig, model: ModelConfig) -> str:
    """ "auto" is the checkpoint's own."""
    return model.dtype if engine.dtype == "auto" else engine.dtype


class Runner:
    """A rank's model with its KV memory.

    Args:
        weights: as `load_weights` read them, for this rank and this expert map.
        members: ranks in process-group order.
    """

    def __init__(
        self,
        engine: EngineConfig,
        model: ModelConfig,
        weights: ModelWeights,
        expert_map: ExpertMap,
        members: list[int],
        exchange: Exchange,
    ) -> None:
        self._device = weights.embedding.device
        dtype = weights.embedding.dtype
        sizes = pool_sizes(model, engine, dtype.itemsize)
        self.blocks = KVBlocks(sizes.num_global, sizes.num_local, engine.block_size, model.chunk_size)
        self.max_model_len = _max_model_len(engine, model, self.blocks)
        cache = KVCache(model, sizes, engine.block_size, dtype, self._device)
        self.model = Llama4(model, weights, cache, expert_map, members, exchange)

    def execute(self, plan: Rows[Scheduled]) -> list[Sample]:
        """Run the step, with no rows where the plan is empty; samples are in the plan's order."""
        inputs = step_inputs(plan, self.blocks.block_size, self.blocks.chunk_size, self._device)
        hidden_TX = self.model.hidden(inputs)
        self._prompt_logprobs(plan, hidden_TX)
        if not len(inputs.sample_rows):
            return []
        logits_SV = self.model.logits(hidden_TX[inputs.sample_rows])
        return sample(logits_SV, [item.sequence for item in plan if item.samples])

    def _prompt_logprobs(self, plan: Rows[Scheduled], hidden_TX: Tensor) -> None:
        first_row = 0
        for item in plan:
            sequence, count = item.sequence, item.sequence.sampling.prompt_logprobs
            rows = hidden_TX[first_row : first_row + item.end - item.start]
            first_row += item.end - item.start
            if count is None or sequence.output_ids:
                continue  # not asked for, or taken already: this is a replay
            # The row at a position predicts the next one; computed again after a preemption, it is written again.
            targets = sequence.prompt_ids[item.start + 1 : item.end + 1]
            del sequence.prompt_logprobs[item.start :]
            for start in range(0, len(targets), LOGITS_ROWS):
                some = targets[start : start + LOGITS_ROWS]
                logits_SV = self.model.logits(rows[start : start + len(some)])
                sequence.prompt_logprobs += logprobs(logits_SV, some, count)


def _max_model_len(engine: EngineConfig, model: ModelConfig, blocks: KVBlocks) -> int:
    fits = blocks.longest(engine.max_num_batched_tokens)
    if engine.max_model_len > model.max_position_embeddings:
        raise UserError(
            f"max_model_len: {engine.max_model_len} is past the checkpoint's context of {model.max_position_embeddings}"
        )
    if engine.max_model_len > fits:
        raise UserError(
            f"max_model_len: {engine.max_model_len} tokens do not fit the KV pools, which hold {fits}; "
            "raise kv_memory_bytes or lower max_model_len"
        )
    return engine.max_model_len or min(model.max_position_embeddings, fits)
