"""One Prometheus endpoint a host, for all of Caravan's processes on it.

Each process writes its numbers to files in one folder (prometheus-client's multi-process mode, switched on by
PROMETHEUS_MULTIPROC_DIR in its environment); a scrape adds them up exactly.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from wsgiref.simple_server import WSGIServer

import psutil
from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from cluster.errors import UsageError

ENVIRONMENT_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


class HostCollector(Collector):
    """Everything in `folder`, without the gauges of processes that are gone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._collector = MultiProcessCollector(None, path=str(folder))  # type: ignore[no-untyped-call]

    def collect(self) -> Iterator[Metric]:
        for file in self._folder.glob("gauge_live*_*.db"):
            pid = int(file.stem.rpartition("_")[2])
            if not psutil.pid_exists(pid):
                mark_process_dead(pid, str(self._folder))  # type: ignore[no-untyped-call]
        yield from self._collector.collect()  # type: ignore[no-untyped-call]


class MetricsEndpoint:
    """Serves `folder`'s metrics over HTTP from construction to `close`.

    Raises:
        UsageError: the port cannot be listened on.
    """

    def __init__(self, host: str, port: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("*.db"):
            file.unlink()
        registry = CollectorRegistry()
        registry.register(HostCollector(folder))
        self._server: WSGIServer
        self._thread: threading.Thread
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise UsageError(
                f"metrics-port: cannot listen on {host}:{port} ({error.strerror}); give another port"
            ) from None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(2)
