"""Configuration of a router: frozen, every field with its unit."""

from dataclasses import dataclass
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
    """Address the Serve replica's gRPC server binds; empty: all of the host's, as Serve does by itself."""
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

    def __post_init__(self) -> None:
        if not self.model_name:
            object.__setattr__(self, "model_name", Path(self.model_dir).resolve().name)
        for name in ("default_max_tokens", "max_prompt_bytes", "max_tokens_per_message"):
            if getattr(self, name) < 1:
                raise RouterConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("stream_stall_s", "watch_silence_s", "reconnect_max_s"):
            if not getattr(self, name) > 0:
                raise RouterConfigError(f"{name}: must be more than 0 seconds, got {getattr(self, name)}")
