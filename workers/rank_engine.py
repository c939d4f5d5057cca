"""What a rank keeps from one epoch to the next: weights, KV memory, sequences, and the engine that steps with them."""

import os
from collections.abc import Callable

import torch

from protos import gang_pb2
from workers.config import RankConfig
from workers.engine import Engine
from workers.epoch_exchange import Rows
from workers.exchange import Exchange, LocalExchange
from workers.expert_map import ExpertMap
from workers.inbox import Inbox
from workers.metrics import RANK_INFO, RankMetrics
from workers.model_config import ModelConfig
from workers.packed_loading import LoadProgress, RankWeights
from workers.runner import TORCH_DTYPES, Runner, resolve_device, resolve_dtype
from workers.scheduler import Emitted, Scheduler
from workers.weights import ModelWeights


class RankEngine:
    """First `load`, then `enter` and `run`, for one epoch after the other, all in one thread.

    Args:
        report: told of the first loading of weights; what it raises ends that.
        publish: as the engine's.
        wake_peers: told the epoch and the step that this rank opens; must not block.
    """

    def __init__(
        self,
        config: RankConfig,
        inbox: Inbox,
        report: Callable[[LoadProgress], None],
        publish: Callable[[int, list[Emitted]], None],
        wake_peers: Callable[[int, int], None],
    ) -> None:
        self._config, self._inbox = config, inbox
        self._report, self._publish, self._wake_peers = report, publish, wake_peers
        self._weights_bytes_read = 0
        self._from: RankWeights | None = None
        self._epoch = 0
        self._engine: Engine | None = None

    @property
    def has_weights(self) -> bool:
        return self._from is not None

    def load(self, expert_map: ExpertMap) -> None:
        """Have the weights that a map gives this rank. The first time may take minutes; later only what is gained does.

        Raises:
            UserError: the checkpoint or the configuration is at fault.
            RuntimeError: the disk failed.
        """
        config, engine = self._config, self._config.engine
        if self._from is None:
            torch.set_num_threads(engine.threads or max(1, (os.cpu_count() or 1) // config.ranks_on_host))
            self.model = ModelConfig.from_folder(engine.model_dir)
            self.dtype = resolve_dtype(engine, self.model)
            dtype, device = TORCH_DTYPES[self.dtype], resolve_device(engine.device)
            self.rows = Rows(self.model.experts_per_token, self.model.hidden_size, dtype, device)
            self._from = RankWeights(engine, self.model, config.rank, dtype, device, self._reported)
        self._weights: ModelWeights = self._from.take(expert_map)

    def prepare(self, expert_map: ExpertMap) -> None:
        """Have all that takes time, so that a gang that runs need not wait for it: weights, KV memory, kernels."""
        self.load(expert_map)
        if self._engine is None:
            self.enter(0, expert_map.ranks, expert_map, LocalExchange())

    def enter(self, epoch: int, members: list[int], expert_map: ExpertMap, exchange: Exchange) -> None:
        """Go on in an epoch with the weights loaded last, which were for this map; what is in the KV memory stays.

        Args:
            members: ranks in process-group order.

        Raises:
            UserError: the configuration is at fault.
            ValueError: an expert has no replica on a member.
        """
        expert_map.check_coverage(members)
        self._epoch = epoch
        if self._engine is None:
            self._engine = self._make(members, expert_map, exchange)
        else:
            self._runner.reshape(self._weights, expert_map, members, exchange)
        self._metrics.enter(epoch, exchange, self._expert_tokens())
        self._engine.enter(epoch, exchange)

    def run(self) -> None:
        """Step until the inbox is interrupted or stopped.

        Raises:
            ExchangeError: a peer is lost, or the exchange was aborted.
        """
        assert self._engine is not None
        self._engine.run()

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        return self._runner.max_model_len

    def load_report(self) -> gang_pb2.RankLoad | None:
        """From any thread; None before the first epoch."""
        if (engine := self._engine) is None:
            return None
        load = engine.load
        return gang_pb2.RankLoad(
            running=load.running,
            waiting=load.waiting,
            pending_tokens=load.pending_tokens,
            kv_usage_ratio=load.kv_usage_ratio,
            tokens_computed=load.tokens_computed,
            tokens_exchanged=load.tokens_exchanged,
            weights_bytes_read=self._weights_bytes_read,
            max_num_seqs=load.max_num_seqs,
            kv_capacity_tokens=load.kv_capacity_tokens,
            bytes_within_host=load.bytes_within_host,
            bytes_between_hosts=load.bytes_between_hosts,
        )

    def _make(self, members: list[int], expert_map: ExpertMap, exchange: Exchange) -> Engine:
        config, engine = self._config, self._config.engine
        self._runner = runner = Runner(engine, self.model, self._weights, expert_map, members, exchange)
        scheduler = Scheduler(
            runner.blocks,
            engine.max_num_batched_tokens,
            engine.max_num_seqs,
            engine.prefix_cache,
            engine.prefill_step_ratio,
        )
        RANK_INFO.labels(config.gang_id, str(config.rank), str(config.incarnation), config.host).set(1)
        # Nothing of this exchange yet: `enter` follows.
        self._metrics = RankMetrics(config.gang_id, config.rank, 0, LocalExchange(), runner.clock, {})
        return Engine(
            runner, scheduler, LocalExchange(), self._inbox, self._metrics, self._publish, self._wake_for_step
        )

    def _wake_for_step(self, step: int) -> None:
        self._wake_peers(self._epoch, step)

    def _expert_tokens(self) -> dict[int, torch.Tensor]:
        counts = [layer.routed.tokens_E for layer in self._runner.model.moe_layers]
        return dict(zip(self.model.moe_layers, counts, strict=True))

    def _reported(self, progress: LoadProgress) -> None:
        self._weights_bytes_read = progress.read
        self._report(progress)
