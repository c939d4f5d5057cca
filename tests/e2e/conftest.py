"""One server for all tests that do it no harm."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.default_model import default_model_dir
from tests.e2e.serving import Server


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The model in the package."""
    return default_model_dir()


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Four ranks in float32."""
    server = Server(tmp_path_factory.mktemp("server"), "--dtype", "float32")
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
