"""Executes a planned step: inputs, model, sampler."""

import logging
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from workers.block_pool import KVBlocks
from workers.config import EngineConfig
from workers.errors import UserError
from workers.exchange import Exchange
from workers.expert_map import ExpertMap
from workers.kernels.build import KernelError, load_kernels
from workers.kv_cache import KVCache, pool_sizes
from workers.model import Llama4
from workers.model_config import ModelConfig
from workers.native import supports
from workers.native_model import NativeLlama4
from workers.sampler import logprobs, sample
from workers.scheduler import Scheduled
from workers.sequence import Sample, Sequence
from workers.step_clock import StepClock
from workers.step_inputs import StepInputs
from workers.weights import ModelWeights

log = logging.getLogger(__name__)

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
        self._cache = KVCache(model, sizes, engine.block_size, dtype, self._device)
        self._config = model
        self.clock = StepClock()
        self._make = _model_class(engine, model, weights)
        self.reshape(weights, expert_map, members, exchange)

    def reshape(self, weights: ModelWeights, expert_map: ExpertMap, members: list[int], exchange: Exchange) -> None:
        """Go on in another epoch: what is in the KV memory stays."""
        self.model = self._make(self._config, weights, self._cache, expert_map, members, exchange, self.clock)

    def execute(self, plan: Rows[Scheduled]) -> list[Sample]:
        """Run the step, with no rows where the plan is empty; samples are in the plan's order."""
        outputs = [_outputs(item) for item in plan]
        inputs = StepInputs(plan, self.blocks.block_size, self.blocks.chunk_size, self._device, outputs)
        hidden_OX = self.model.hidden(inputs)
        first = 0
        sample_rows: list[int] = []
        for item, wanted in zip(plan, outputs, strict=True):
            if _wants_prompt_logprobs(item.sequence):
                self._prompt_logprobs(item, hidden_OX[first : first + len(wanted)])
            first += len(wanted)
            if item.samples:
                sample_rows.append(first - 1)
        if not sample_rows:
            self.clock.lap("head")
            return []
        logits_SV = self.model.logits(hidden_OX if len(sample_rows) == first else hidden_OX[sample_rows])
        self.clock.lap("head")
        samples = sample(logits_SV, [item.sequence for item in plan if item.samples])
        self.clock.lap("sample")
        return samples

    def _prompt_logprobs(self, item: Scheduled, hidden_nX: Tensor) -> None:
        sequence, count = item.sequence, item.sequence.sampling.prompt_logprobs
        assert count is not None
        # The row at a position predicts the next one; computed again after a preemption, it is written again.
        targets = sequence.prompt_ids[item.start + 1 : item.end + 1]
        del sequence.prompt_logprobs[item.start :]
        for start in range(0, len(targets), LOGITS_ROWS):
            some = targets[start : start + LOGITS_ROWS]
            logits_SV = self.model.logits(hidden_nX[start : start + len(some)])
            sequence.prompt_logprobs += logprobs(logits_SV, some, count)


def _wants_prompt_logprobs(sequence: Sequence) -> bool:
    # With outputs they were taken already: this is a replay.
    return sequence.sampling.prompt_logprobs is not None and not sequence.output_ids


def _outputs(item: Scheduled) -> range:
    """Positions whose hidden states are used: the one that the next token is drawn from, or all for their logits."""
    if _wants_prompt_logprobs(item.sequence):
        return range(item.start, item.end)
    return range(item.end - item.samples, item.end)


def _model_class(engine: EngineConfig, model: ModelConfig, weights: ModelWeights) -> type[Llama4] | type[NativeLlama4]:
    tensor = weights.embedding
    if engine.kernels == "eager" or tensor.device.type != "cpu" or not supports(model, tensor.dtype):
        if engine.kernels == "native":
            raise UserError("kernels: native are asked for, but they are for CPUs and heads of up to 256; use auto")
        return Llama4
    try:
        load_kernels()
    except KernelError as error:
        if engine.kernels == "native":
            raise UserError(f"kernels: native are asked for, but {error}") from None
        log.warning("computing without CPU kernels, several times slower: %s", error)
        return Llama4
    return NativeLlama4


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
