"""One server for all tests that do it no harm."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.serving import Server
from workers.random_checkpoint import RandomShape, write_random_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Maverick's shape, 128 experts, at toy size."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    write_random_checkpoint(folder, RandomShape(hidden_size=64, num_layers=4, head_dim=16, expert_mlp_size=32))
    return folder


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Four ranks in float32."""
    server = Server(tmp_path_factory.mktemp("server"), "--model", str(checkpoint), "--dtype", "float32")
    try:
        assert server.wait_ready() == f"ready grpc={server.address} http={server.http} metrics={server.metrics}"
        yield server
        seconds = server.end(signal.SIGINT)
        assert seconds < 10, "Ctrl-C"
        assert server.left == []
        assert server.process.returncode == 0
        assert server.process.stdout.read() == "", "nothing but the ready line"
    finally:
        server.kill_all()
