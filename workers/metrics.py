"""Prometheus metrics of a rank. In several processes of a host they meet in prometheus-client's shared files
(PROMETHEUS_MULTIPROC_DIR), from which the host's one endpoint serves exact sums."""

import time
from collections import defaultdict
from itertools import product

import torch
from prometheus_client import Counter, Gauge, Histogram
from torch import Tensor

from workers.exchange import Exchange
from workers.scheduler import Scheduler
from workers.step_clock import StepClock

# A step on a GPU takes milliseconds, one with a long prompt on a CPU seconds.
STEP_BUCKETS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096, 8.192)
FLUSH_SECONDS = 1.0

_LABELS = ("gang", "rank")
RUNNING = Gauge("caravan_sequences_running", "Sequences that run.", _LABELS, multiprocess_mode="livemostrecent")
WAITING = Gauge("caravan_sequences_waiting", "Sequences that wait.", _LABELS, multiprocess_mode="livemostrecent")
KV_USAGE = Gauge(
    "caravan_kv_usage_ratio",
    "Share of KV blocks in use, the fuller pool, 0 to 1.",
    _LABELS,
    multiprocess_mode="livemostrecent",
)
EPOCH = Gauge("caravan_epoch", "The gang's epoch as this rank knows it.", _LABELS, multiprocess_mode="livemostrecent")
RANK_INFO = Gauge(
    "caravan_rank_info",
    "1: which incarnation of a rank runs, and the address of its host.",
    (*_LABELS, "incarnation", "host"),
    multiprocess_mode="livemostrecent",
)
STEP_SECONDS = Histogram("caravan_step_seconds", "Wall time of an engine step.", _LABELS, buckets=STEP_BUCKETS)
STEP_PART_SECONDS = Counter(
    "caravan_step_part_seconds", "Wall time of engine steps, by the part it went to.", (*_LABELS, "part")
)
TOKENS = Counter("caravan_computed_tokens", "Tokens computed, prompt and output.", _LABELS)
PREEMPTIONS = Counter("caravan_preemptions", "Sequences that gave their blocks back to be computed again.", _LABELS)
PREFIX_LOOKUP = Counter("caravan_prefix_lookup_tokens", "Tokens of sequences that were looked up as prefixes.", _LABELS)
PREFIX_HITS = Counter("caravan_prefix_hit_tokens", "Those of them that did not need to be computed.", _LABELS)
PREFIX_BLOCKS = Gauge(
    "caravan_prefix_cached_blocks",
    "KV blocks that later sequences can use again, those in use included.",
    (*_LABELS, "pool"),
    multiprocess_mode="livemostrecent",
)
EXPERT_TOKENS = Counter("caravan_expert_tokens", "Tokens a routed expert computed.", (*_LABELS, "layer", "expert"))
EXCHANGE_SECONDS = Counter(
    "caravan_exchange_seconds", "Time in dispatch and combine, waiting for peers included.", _LABELS
)
EXCHANGE_BYTES = Counter(
    "caravan_exchange_bytes",
    "Bytes exchanged with other ranks, of the same host and of others.",
    (*_LABELS, "direction", "scope"),
)


_OF_EXCHANGE = {"seconds", "bytes_within_host", "bytes_between_hosts", "received_within_host", "received_between_hosts"}


class RankMetrics:
    """Writes one rank's series. What changes with every step is summed here and flushed about once a second."""

    def __init__(
        self,
        gang_id: str,
        rank: int,
        epoch: int,
        exchange: Exchange,
        clock: StepClock,
        expert_tokens: dict[int, Tensor],
    ) -> None:
        """`expert_tokens` are the counts of each MoE layer, by its number in the model; taken and set back to 0."""
        self._labels = (gang_id, str(rank))
        self._exchange, self._clock, self._expert_tokens = exchange, clock, expert_tokens
        self._step_seconds = STEP_SECONDS.labels(*self._labels)
        self._tokens = TOKENS.labels(*self._labels)
        self._running, self._waiting = RUNNING.labels(*self._labels), WAITING.labels(*self._labels)
        self._kv_usage = KV_USAGE.labels(*self._labels)
        self._flushed: dict[str, float] = defaultdict(float)
        self._prefix_lookups, self._prefix_hits = (c.labels(*self._labels) for c in (PREFIX_LOOKUP, PREFIX_HITS))
        self._prefix_blocks = [PREFIX_BLOCKS.labels(*self._labels, pool) for pool in ("global", "local")]
        self._flushed_at = 0.0
        EPOCH.labels(*self._labels).set(epoch)
        self.flush()

    def enter(self, epoch: int, exchange: Exchange, expert_tokens: dict[int, Tensor]) -> None:
        """Another epoch, whose exchange counts from 0."""
        self.flush()
        self._exchange, self._expert_tokens = exchange, expert_tokens
        for name in [name for name in self._flushed if name in _OF_EXCHANGE]:
            del self._flushed[name]
        EPOCH.labels(*self._labels).set(epoch)

    def observe_step(self, seconds: float, num_tokens: int, scheduler: Scheduler) -> None:
        """After each step that computed `num_tokens` here."""
        self._step_seconds.observe(seconds)
        self._tokens.inc(num_tokens)
        self._running.set(scheduler.num_running)
        self._waiting.set(scheduler.num_waiting)
        self._kv_usage.set(scheduler.kv_usage_ratio)
        self._add("preemptions", scheduler.num_preemptions, PREEMPTIONS.labels(*self._labels))
        self._add("lookups", scheduler.prefix_lookup_tokens, self._prefix_lookups)
        self._add("hits", scheduler.prefix_hit_tokens, self._prefix_hits)
        for gauge, blocks in zip(self._prefix_blocks, scheduler.num_cached_blocks, strict=True):
            gauge.set(blocks)
        if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the sums out; the engine calls it before it parks, so that an idle gang's numbers are complete."""
        self._flushed_at = time.monotonic()
        self._add("seconds", self._exchange.seconds, EXCHANGE_SECONDS.labels(*self._labels))
        for direction, scope in product(("sent", "received"), ("within_host", "between_hosts")):
            name = f"{'bytes' if direction == 'sent' else direction}_{scope}"
            self._add(name, getattr(self._exchange, name), EXCHANGE_BYTES.labels(*self._labels, direction, scope))
        for part, seconds in self._clock.seconds.items():
            self._add(part, seconds, STEP_PART_SECONDS.labels(*self._labels, part))
        for number, tokens_E in self._expert_tokens.items():
            for expert in torch.nonzero(tokens_E).squeeze(1).tolist():
                EXPERT_TOKENS.labels(*self._labels, str(number), str(expert)).inc(int(tokens_E[expert]))
            tokens_E.zero_()

    def _add(self, name: str, total: float, counter: Counter) -> None:
        counter.inc(total - self._flushed[name])
        self._flushed[name] = total
