"""The servers that tests/growth.py measures, and the checkpoints they serve."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.e2e.serving import Server

# 256 streams on one rank, and a prompt of 32,768 tokens beside nothing. Else as users have it.
CONFIG = """
[serve]
prefix_cache = false
[engine]
max_num_seqs = 256
kv_memory_bytes = 536870912
weights_cache_dir = "{cache}"
"""


@dataclass(frozen=True)
class Checkpoint:
    """One of those that tests/growth_checkpoints.py writes."""

    experts: int = 128
    expert_mlp: int = 512

    @property
    def name(self) -> str:
        return f"{self.experts} experts of {self.expert_mlp}"


@dataclass(frozen=True)
class ServerSpec:
    """How a server is started."""

    ranks: int
    checkpoint: Checkpoint | None
    """None: the model in the package."""

    @property
    def name(self) -> str:
        model = self.checkpoint.name if self.checkpoint is not None else "the model in the package"
        return f"{model}, {self.ranks} rank{'s' if self.ranks != 1 else ''}"


class Folders:
    """Checkpoints, packed weights and servers' files under one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._started = 0

    def of(self, checkpoint: Checkpoint) -> Path:
        """The checkpoint's folder, with the packed weights inside; whoever is done with it removes it."""
        return self._root / f"{checkpoint.experts}x{checkpoint.expert_mlp}"

    @contextmanager
    def serve(self, spec: ServerSpec) -> Iterator[Server]:
        """A server that is ready; when the context ends nothing of it is left.

        Raises:
            AssertionError: it does not start; with what it said.
        """
        self._started += 1
        folder = self._root / f"server{self._started}"
        folder.mkdir()
        cache = self.of(spec.checkpoint) / "packed" if spec.checkpoint is not None else folder / "packed"
        config = folder / "serve.toml"
        config.write_text(CONFIG.format(cache=cache))
        flags = ["--config", str(config), "--ranks", str(spec.ranks)]
        if spec.checkpoint is not None:
            flags += ["--model", str(self._written(spec.checkpoint))]
        server = Server(folder, *flags)
        try:
            server.wait_ready()
            yield server
        finally:
            server.end()
            server.kill_all()

    def _written(self, checkpoint: Checkpoint) -> Path:
        folder = self.of(checkpoint) / "model"
        if not folder.exists():
            # torch and transformers: seconds, and whoever measures a server that runs needs neither.
            from tests import growth_checkpoints

            config = growth_checkpoints.text_config(checkpoint.experts, checkpoint.expert_mlp)
            growth_checkpoints.write_checkpoint(folder, config, self._tokenizer)
        return folder

    @cached_property
    def _tokenizer(self) -> Any:
        from tests import growth_checkpoints

        return growth_checkpoints.train_tokenizer()
