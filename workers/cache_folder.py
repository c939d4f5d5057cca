"""Where a user's caches lie: what is made once and may be deleted at any time."""

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """$XDG_CACHE_HOME/caravan/`kind`, else ~/.cache/caravan/`kind`.

    Raises:
        OSError: there is no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:
        raise OSError("there is no home folder to keep a cache in; set XDG_CACHE_HOME") from None
    return home / "caravan" / kind
