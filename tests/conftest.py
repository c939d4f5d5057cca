"""What all tests share: nothing phones home, and a folder's tests carry that folder's marker."""

import os
import tempfile
from pathlib import Path

# Before any test imports the libraries that read these once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    RAY_USAGE_STATS_ENABLED="0",
    DO_NOT_TRACK="1",
)
# Several ranks share few cores; a test that wants threads asks for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest

# Packed weights of tests are nobody else's; removed as this process ends.
_CACHE = tempfile.TemporaryDirectory(prefix="caravan-test-cache-")
# Kernels are named by all that they are made of, so one compilation serves the tests and the user alike.
_KERNELS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "caravan" / "kernels"
_KERNELS.mkdir(parents=True, exist_ok=True)
(Path(_CACHE.name) / "caravan").mkdir()
(Path(_CACHE.name) / "caravan" / "kernels").symlink_to(_KERNELS)
os.environ["XDG_CACHE_HOME"] = _CACHE.name

# A deadline per example would measure the machine's other work.
hypothesis.settings.register_profile("caravan", deadline=None, print_blob=True)
hypothesis.settings.load_profile("caravan")

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in ("distributed", "e2e", "gpu"):
            item.add_marker(folder)
