"""What a router measures. With PROMETHEUS_MULTIPROC_DIR set, all routers of a host add to the same numbers."""

import time

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
GAP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10)
REPLAY_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 20, 30, 60)
REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class RouterMetrics:
    """The router's metrics, once a process and registry."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.first_token = Histogram(
            "caravan_time_to_first_token_seconds",
            "From a request's arrival at the router to its first token's.",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.gap = Histogram(
            "caravan_inter_token_seconds",
            "Between two tokens of a stream, as they arrive at the router.",
            buckets=GAP_BUCKETS,
            registry=registry,
        )
        self.request = Histogram(
            "caravan_request_seconds",
            "From a request's arrival at the router to its end, of requests that got past validation.",
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = Counter("caravan_prompt_tokens", "Tokens of accepted prompts.", registry=registry)
        self.output_tokens = Counter("caravan_output_tokens", "Tokens that ranks sent for streams.", registry=registry)
        self.requests = Counter(
            "caravan_requests",
            "Generate requests ended, by finish reason (stop, length, abort, error, deadline) and gRPC status.",
            ["finish_reason", "status"],
            registry=registry,
        )
        self.streams = Gauge(
            "caravan_streams_running",
            "Generate streams open at the router.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.fenced = Counter(
            "caravan_router_fenced_messages",
            "Messages of ranks and leaders dropped because their gang, epoch or incarnation was not current.",
            registry=registry,
        )
        self.replayed = Counter(
            "caravan_streams_replayed",
            "Streams that another rank went on with, by why theirs was lost (connection, dead, refused, given_up, "
            "fenced).",
            ["reason"],
            registry=registry,
        )
        self.replay_gap = Histogram(
            "caravan_replay_gap_seconds",
            "From the loss of a stream's rank to its next token.",
            buckets=REPLAY_BUCKETS,
            registry=registry,
        )

        self.queued_tokens = Gauge(
            "caravan_queued_tokens",
            "Tokens (prompt and max_tokens) of requests that wait at the router for a rank.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.queue_wait = Histogram(
            "caravan_queue_wait_seconds",
            "From a request's admission to its going to a rank.",
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self.resumed = Counter(
            "caravan_streams_resumed", "Connections that took up an answer after its first token.", registry=registry
        )


class StreamTimer:
    """The times of one request, to its `end` or until it is `refused`.

    Args:
        arrival: when it came, by time.perf_counter().
    """

    def __init__(self, metrics: RouterMetrics, arrival: float) -> None:
        self._metrics = metrics
        metrics.streams.inc()
        self._start = arrival
        self._last_token: float | None = None
        self._accepted = False

    def accepted(self, prompt_tokens: int) -> None:
        """The request is valid and admitted."""
        self._accepted = True
        self._metrics.prompt_tokens.inc(prompt_tokens)

    def refused(self) -> None:
        """There is no stream after all."""
        self._metrics.streams.dec()

    def tokens(self, count: int) -> None:
        """`count` tokens arrived together: they share the time since the one before."""
        now = time.perf_counter()
        if self._last_token is None:
            self._metrics.first_token.observe(now - self._start)
        else:
            for _ in range(count):
                self._metrics.gap.observe((now - self._last_token) / count)
        self._last_token = now
        self._metrics.output_tokens.inc(count)

    def started(self) -> None:
        """The request goes to a rank."""
        self._metrics.queue_wait.observe(time.perf_counter() - self._start)

    def end(self, finish_reason: str, status: str) -> None:
        """The request ended, once: "stop", "length", "abort", "error" or "deadline", and the gRPC status."""
        self._metrics.streams.dec()
        self._metrics.requests.labels(finish_reason, status).inc()
        if self._accepted:
            self._metrics.request.observe(time.perf_counter() - self._start)
