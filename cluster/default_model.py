"""The model served when none is named: the trained one that ships in the package."""

from pathlib import Path

import workers


def default_model_dir() -> Path:
    """Its folder; see the README there."""
    return Path(workers.__file__).parent / "nano"
