"""Weights once a host: what four processes hold together, counted by the kernel."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import MAVERICK, write
from tests.distributed.processes import Processes

RANKS = 4
# About 60 MB in float32, most of it in routed experts as in the real model.
SHAPE = {
    **MAVERICK,
    "num_hidden_layers": 4,
    "num_local_experts": 64,
    "hidden_size": 192,
    "intermediate_size": 192,
    "intermediate_size_mlp": 384,
    "vocab_size": 4096,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write(folder, SHAPE)
    return folder


@pytest.fixture
def pool(processes: Processes) -> Iterator[Processes]:
    yield processes
    processes.run("weight_jobs:forget", [()] * RANKS)


def test_four_ranks_hold_the_checkpoint_once(pool: Processes, folder: Path, tmp_path: Path) -> None:
    checkpoint_bytes = (folder / "model.safetensors").stat().st_size
    assert checkpoint_bytes > 40e6
    cache = tmp_path / "cache"
    for start in ("first", "second"):
        loaded = pool.run("weight_jobs:load", [(folder, cache, rank, RANKS) for rank in range(RANKS)])
        assert all(rank.note == "" for rank in loaded)
        assert any(rank.packed_bytes for rank in loaded) == (start == "first")
        # Buffers, not weights: a rank's own quarter of the experts would be 14 MB.
        assert all(rank.anonymous_bytes < 0.1 * checkpoint_bytes for rank in loaded)

        shares = pool.run("weight_jobs:shared_bytes", [(cache,)] * RANKS)
        together = sum(share for share, _ in shares)
        assert 0.95 * checkpoint_bytes < together <= 1.3 * checkpoint_bytes
        assert all(0.2 * checkpoint_bytes < resident < 0.7 * checkpoint_bytes for _, resident in shares)

    # Gained experts cost nothing: all of them in all ranks are still one copy.
    sums = pool.run("weight_jobs:touch_every_expert", [()] * RANKS)
    assert len(set(sums)) == 1
    shares = pool.run("weight_jobs:shared_bytes", [(cache,)] * RANKS)
    assert sum(share for share, _ in shares) <= 1.3 * checkpoint_bytes
    assert all(resident > 0.9 * checkpoint_bytes for _, resident in shares)
