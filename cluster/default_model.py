"""The model served when none is named: a small one that the first run writes into the cache folder."""

import importlib
import os
from pathlib import Path

from cluster.errors import UsageError
from workers.errors import UserError

NAME = "nano-random-v1"


def default_model_dir() -> Path:
    """Where it lies; nothing is written."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "caravan" / NAME


def ensure_default_model() -> Path:
    """Its folder, written first if need be (seconds, 20 MB).

    Raises:
        UsageError: the cache folder cannot be written.
    """
    folder = default_model_dir()
    if not folder.exists():
        # Needs torch, which every other run of the command line does without.
        writer = importlib.import_module("workers.random_checkpoint")
        try:
            writer.write_random_checkpoint(folder)
        except UserError as error:
            # Another process may have been quicker: its model is as good.
            if not (folder / "config.json").exists():
                raise UsageError(f"{error}; XDG_CACHE_HOME says where the cache is") from None
    return folder
