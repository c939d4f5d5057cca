"""Configuration of a router: frozen, every field with its unit."""

from dataclasses import dataclass, field
from pathlib import Path

from router.errors import RouterConfigError


@dataclass(frozen=True)
class RouterConfig:
    """What a router serves and its bounds. Gangs are not here: their leaders' addresses come at run time.

    Raises:
        RouterConfigError: a value is out of its range.
    """

    model_dir: Path
    """Folder of the checkpoint: config.json, tokenizer.json, generation_config.json."""
    model_name: str = ""
    """Name clients may ask for; empty: the folder's name."""
    host: str = ""
    """Address that both doors listen on; empty: all of this machine's."""
    grpc_port: int = 0
    """0: any free one."""
    http_port: int = 0
    """0: any free one."""
    grpc_reflection: bool = False
    """Tell gRPC clients that ask which services and messages there are."""
    max_connection_age_s: float = 0.0
    """Seconds after which a gRPC connection is asked to make room for a new one, as soon as its calls have ended: how
    clients behind a load balancer of connections find new routers. 0: never."""
    default_max_tokens: int = 1024
    """Output tokens of a request that does not say, where the context leaves that many."""
    max_prompt_bytes: int = 4 * 2**20
    """UTF-8 bytes of the longest text prompt that is tokenized at all."""
    max_tokens_per_message: int = 1024
    """Tokens of one GenerateResponse at most: bounds the message a slow client gets when it reads again."""
    stream_stall_s: float = 600.0
    """Seconds a stream waits for its next token before it counts as lost."""
    watch_silence_s: float = 10.0
    """Seconds without a word from a leader (it sends every second) before the router connects anew."""
    reconnect_max_s: float = 2.0
    """Longest pause between two attempts to reach a leader or a rank."""
    replay_wait_s: float = 60.0
    """Seconds without any rank that a stream whose rank was lost, or a request that waits, is kept for one to come."""
    max_replays: int = 5
    """Ranks that a stream may lose in a row without a token in between; 0: it ends with the first."""
    max_queued_tokens: int = 262_144
    """Tokens (prompt and max_tokens) of requests that wait for a rank; one tenant alone may hold 41% of them."""
    tokens_per_minute: int = 0
    """Tokens (prompt and output) a minute of each tenant at this router; 0: no bound."""
    tenant_tokens_per_minute: dict[str, int] = field(default_factory=dict)
    """The same for single tenants, by name."""
    resume_retention_s: float = 60.0
    """Seconds a resumable request goes on, and its answer is kept, without a connection."""
    max_retained_tokens: int = 4_000_000
    """Output tokens kept for resuming after their end, each alternative log-probability counted as one more."""

    def __post_init__(self) -> None:
        if not self.model_name:
            object.__setattr__(self, "model_name", Path(self.model_dir).resolve().name)
        for name in (
            "default_max_tokens",
            "max_prompt_bytes",
            "max_tokens_per_message",
            "max_queued_tokens",
            "max_retained_tokens",
        ):
            if getattr(self, name) < 1:
                raise RouterConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name, quota in {"tokens_per_minute": self.tokens_per_minute, **self.tenant_tokens_per_minute}.items():
            if quota < 0:
                raise RouterConfigError(f"{name}: tokens a minute must be at least 0, got {quota}")
        if self.max_replays < 0:
            raise RouterConfigError(f"max_replays: must be at least 0, got {self.max_replays}")
        for name in ("stream_stall_s", "watch_silence_s", "reconnect_max_s", "replay_wait_s", "resume_retention_s"):
            if not getattr(self, name) > 0:
                raise RouterConfigError(f"{name}: must be more than 0 seconds, got {getattr(self, name)}")
