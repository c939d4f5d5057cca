"""An engine's parts put together in the calling thread, for tests that drive it step by step."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.checkpoint import Checkpoint
from workers.config import EngineConfig
from workers.engine import Engine
from workers.exchange import Exchange, LocalExchange
from workers.expert_map import ExpertMap
from workers.inbox import Inbox
from workers.metrics import RankMetrics
from workers.model_config import ModelConfig
from workers.runner import TORCH_DTYPES, Runner, resolve_dtype
from workers.scheduler import Emitted, Scheduler
from workers.sequence import Sample, SamplingParams, Sequence
from workers.step_inputs import StepInputs
from workers.weights import ModelWeights, load_weights


def engine_config(folder: Path, **overrides: Any) -> EngineConfig:
    """Small pools and a small budget, so that a test reaches their ends."""
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "kv_memory_bytes": 4 * 2**20,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 16,
        "threads": 1,
        "exchange_timeout_s": 30.0,
        # What is planned must not depend on how fast the test runs.
        "prefill_step_ratio": 0.0,
    }
    return EngineConfig(model_dir=folder, **{**defaults, **overrides})


def greedy(number: int, prompt_ids: list[int], max_tokens: int, router: str = "router", **more: Any) -> Sequence:
    return Sequence((router, number), list(prompt_ids), SamplingParams(), max_tokens, **more)


def prompt(seed: int, length: int, vocab_size: int = 320) -> list[int]:
    """Random ids past the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (length,), generator=generator).tolist()


@lru_cache(maxsize=4)
def _weights(
    folder: Path, model: ModelConfig, expert_map: ExpertMap, rank: int, dtype: torch.dtype, device: torch.device
) -> ModelWeights:
    """Ranks of one checkpoint share what they only read."""
    return load_weights(Checkpoint(folder), model, expert_map, rank, dtype, device)


class LocalRank:
    """One rank's runner, scheduler and engine over `exchange`.

    `emitted` collects what the engine published, a list of (step, tokens).
    """

    def __init__(
        self,
        config: EngineConfig,
        expert_map: ExpertMap | None = None,
        rank: int = 0,
        members: list[int] | None = None,
        exchange: Exchange | None = None,
        gang: str = "test",
        publish: Callable[[int, list[Emitted]], None] | None = None,
        weights: ModelWeights | None = None,
    ) -> None:
        self.members = members or [0]
        self.model = ModelConfig.from_folder(config.model_dir)
        self.map = expert_map or ExpertMap.even(self.model.num_moe_layers, self.model.num_experts, self.members)
        dtype = TORCH_DTYPES[resolve_dtype(config, self.model)]
        self.device = torch.device(config.device)
        weights = weights or _weights(config.model_dir, self.model, self.map, rank, dtype, self.device)
        self.exchange = exchange or LocalExchange()
        self.runner = Runner(config, self.model, weights, self.map, self.members, self.exchange)
        self.scheduler = Scheduler(
            self.runner.blocks,
            config.max_num_batched_tokens,
            config.max_num_seqs,
            config.prefix_cache,
            config.prefill_step_ratio,
        )
        self.inbox = Inbox()
        counts = [layer.routed.tokens_E for layer in self.runner.model.moe_layers]
        expert_tokens = dict(zip(self.model.moe_layers, counts, strict=True))
        self.metrics = RankMetrics(gang, rank, 1, self.exchange, self.runner.clock, expert_tokens)
        self.emitted: list[tuple[int, list[Emitted]]] = []
        self.engine = Engine(
            self.runner,
            self.scheduler,
            self.exchange,
            self.inbox,
            self.metrics,
            publish or (lambda step, emitted: self.emitted.append((step, emitted))),
            wake_peers=lambda step: None,
        )

    def generate(self, sequences: Iterable[Sequence]) -> list[list[int]]:
        """Run sequences to their ends, all at once; their outputs."""
        sequences = list(sequences)
        for sequence in sequences:
            self.scheduler.add(sequence)
        while self.scheduler.num_running or self.scheduler.num_waiting:
            plan = self.scheduler.plan()
            assert plan, "sequences are there, but nothing is planned"
            self.scheduler.commit(plan, self.runner.execute(plan))
        self.scheduler.check_integrity()
        return [sequence.output_ids for sequence in sequences]

    def all_logits(
        self, sequences: Iterable[Sequence], next_tokens: dict[Any, list[int]] | None = None
    ) -> list[Tensor]:
        """Logits of every position computed of every sequence, [T, V] each; tokens are not drawn but taken from
        `next_tokens`, which maps a sequence's key to its outputs (default: token 3 for ever)."""
        sequences = list(sequences)
        rows: dict[Any, list[Tensor]] = {sequence.key: [] for sequence in sequences}
        for sequence in sequences:
            self.scheduler.add(sequence)
        while plan := self.scheduler.plan():
            inputs = StepInputs(plan, self.runner.blocks.block_size, self.model.chunk_size, self.device)
            logits_TV = self.runner.model.logits(self.runner.model.hidden(inputs))
            for item, rows_nV in zip(plan, logits_TV.split([item.end - item.start for item in plan]), strict=True):
                rows[item.sequence.key].append(rows_nV)
            drawn = []
            for item in plan:
                if item.samples:
                    known = (next_tokens or {}).get(item.sequence.key, [])
                    position = len(item.sequence.output_ids)
                    drawn.append(Sample(known[position] if position < len(known) else 3))
            self.scheduler.commit(plan, drawn)
        self.scheduler.check_integrity()
        return [torch.cat(rows[sequence.key]) for sequence in sequences]
