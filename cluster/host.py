"""What Caravan does on a host of a gang, beside its ranks: tell of itself, try ports, have the checkpoint there, count.

`HostWork` does it, synchronously, on the host that its process runs on. `Host` is the same seen from the gang's leader,
wherever that host is.
"""

import contextlib
import importlib
import platform
import shutil
import socket
import statistics
import threading
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prometheus_client import Gauge

from cluster.default_model import default_model_dir
from cluster.errors import one_sentence
from cluster.metrics_endpoint import MetricsEndpoint
from cluster.network import NetworkConfig, address_of, bind_port, interface_of
from cluster.probe import EchoPort, round_trip, unreachable
from cluster.processes import end_rank
from workers.checkpoint_check import check_checkpoint
from workers.content_fingerprint import content_fingerprint
from workers.errors import UserError
from workers.model_config import ModelConfig
from workers.model_download import FetchProgress
from workers.model_source import ModelSource
from workers.remote import FetchError

PACKAGES = ("caravan", "torch")
FREE_BYTES = 64 * 2**20
"""What a host's temporary folder must have for logs and metrics."""
_LATEST = 5

ROUND_TRIP = Gauge(
    "caravan_host_round_trip_seconds",
    "A message from one host's agent to another's and back, median of the latest few.",
    ("host", "peer"),
    multiprocess_mode="livemostrecent",
)


@dataclass(frozen=True)
class WantedModel:
    """Which checkpoint every host must have, and where it may keep what it fetches."""

    source: str = ""
    """As `caravan serve --model` takes it; empty: the model that comes with Caravan."""
    offline: bool = False
    cache_dir: Path | None = None
    cache_bytes: int = 0
    """As in table [serve]: models_cache_dir, models_cache_bytes."""


@dataclass(frozen=True)
class HostSpec:
    """What a host must know to work for a gang."""

    ray_address: str
    """By which Ray knows it."""
    network: NetworkConfig
    metrics_folder: Path
    """Where the ranks of this host write their metrics."""
    metrics_port: int
    """Where they are served; 0: elsewhere, by who made `metrics_folder`."""
    model: WantedModel = field(default_factory=WantedModel)


@dataclass(frozen=True)
class HostFacts:
    """A host as it found itself."""

    address: str
    """By which ranks and leader reach it."""
    hostname: str
    interface: str
    """With that address."""
    versions: Mapping[str, str]
    """Of Caravan, torch and Python."""
    temporary_folder: str
    free_bytes: int
    """On the disk of the temporary folder."""


@dataclass(frozen=True)
class ModelState:
    """How far a host is with the checkpoint."""

    folder: Path | None = None
    """Where it lies, once it does."""
    fingerprint: str = ""
    bytes_done: int = 0
    bytes_total: int = 0
    """Of what is fetched; 0 where nothing is."""
    error: str = ""
    """Why it will not lie there: one sentence."""


def versions() -> dict[str, str]:
    """Of what must be the same on every host of a gang."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


class HostWork:
    """Its methods may be called from several threads."""

    def __init__(self, spec: HostSpec) -> None:
        self._spec = spec
        self._facts: HostFacts | None = None
        self._echo: EchoPort | None = None
        self._tried: list[EchoPort] = []
        self._metrics: MetricsEndpoint | None = None
        self._model = ModelState()
        self._fetching: threading.Thread | None = None
        self._stop = threading.Event()
        self._round_trips: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_LATEST))

    def facts(self) -> HostFacts:
        """Who this host is; opens its agent's port and its metrics.

        Raises:
            UserError: it lacks the interface asked for, its address is not its own, or a port is taken.
        """
        spec, network = self._spec, self._spec.network
        address = address_of(network.interface) if network.interface else spec.ray_address
        try:
            interface = interface_of(address)
        except UserError as error:
            raise UserError(
                f"Ray knows it by an address that is not its own: {error}; correct what its `ray start` was given as "
                "--node-ip-address"
            ) from None
        spec.metrics_folder.mkdir(parents=True, exist_ok=True)
        if self._echo is None:
            self._echo = EchoPort(bind_port(network.agent_ports, address, "agent_ports"))
        if spec.metrics_port and self._metrics is None:
            self._metrics = MetricsEndpoint(address, spec.metrics_port, spec.metrics_folder)
        folder = spec.metrics_folder.parent
        self._facts = HostFacts(
            address,
            socket.gethostname(),
            interface,
            versions(),
            str(folder),
            shutil.disk_usage(folder).free,
        )
        return self._facts

    def open_ports(self, ranks: int) -> list[int]:
        """Listen on the ports that so many ranks will take here, the agent's own first; ranges left open have none."""
        assert self._facts is not None
        assert self._echo is not None
        network = self._spec.network
        for name in ("rank_ports", "exchange_ports"):
            if getattr(network, name) is not None:
                for _ in range(ranks):
                    self._tried.append(EchoPort(bind_port(getattr(network, name), self._facts.address, name)))
        return [self._echo.port, *(echo.port for echo in self._tried)]

    def close_ports(self) -> None:
        """Give those of `open_ports` to the ranks; the agent's own stays."""
        while self._tried:
            self._tried.pop().close()

    def unreachable(self, addresses: Sequence[str]) -> dict[str, str]:
        """Of HOST:PORTs, those that this host does not reach, with the reason."""
        return unreachable(addresses)

    def round_trips(self, addresses: Mapping[str, str]) -> dict[str, float]:
        """Median seconds there and back to other hosts, of the latest few; one more is measured now.

        Args:
            addresses: HOST:PORT of other hosts' agents, by host.
        """
        assert self._facts is not None
        for host, address in addresses.items():
            with contextlib.suppress(OSError):
                self._round_trips[host].append(round_trip(address))
        medians = {host: statistics.median(self._round_trips[host]) for host in addresses if self._round_trips[host]}
        for host, seconds in medians.items():
            ROUND_TRIP.labels(self._facts.address, host).set(seconds)
        return medians

    def model(self) -> ModelState:
        """Have the checkpoint here; asked again, how far that is."""
        if self._fetching is None:
            self._fetching = threading.Thread(target=self._get_model, name="fetch", daemon=True)
            self._fetching.start()
            self._fetching.join(0.05)
        return self._model

    def kill(self, pid: int) -> bool:
        """End a rank's process for certain; True once it is gone."""
        return end_rank(pid)

    def close(self) -> None:
        """Everything that was opened and made goes; a checkpoint that was fetched stays."""
        self._stop.set()
        self.close_ports()
        if self._echo is not None:
            self._echo.close()
        if self._metrics is not None:
            self._metrics.close()
            shutil.rmtree(self._spec.metrics_folder.parent, ignore_errors=True)

    def _get_model(self) -> None:
        def report(progress: FetchProgress) -> None:
            self._model = ModelState(bytes_done=progress.bytes_done, bytes_total=progress.bytes_total)

        try:
            wanted = self._spec.model
            source = ModelSource.parse(wanted.source) if wanted.source else ModelSource.of(default_model_dir())
            folder = source.path if source.is_local else _fetch(source, wanted, report, self._stop)
            check_checkpoint(folder, ModelConfig.from_folder(folder))
            self._model = replace(self._model, folder=folder, fingerprint=content_fingerprint(folder))
        except Exception as error:
            known = isinstance(error, UserError | FetchError)
            self._model = ModelState(error=one_sentence(error if known else f"{type(error).__name__}: {error}", 400))


def _fetch(
    source: ModelSource, wanted: WantedModel, report: Callable[[FetchProgress], None], stop: threading.Event
) -> Path:
    # Most hosts need none of it.
    fetching: Any = importlib.import_module("workers.model_fetch")
    cache: Any = importlib.import_module("workers.model_cache")
    folder: Path = fetching.fetch(
        source,
        wanted.cache_dir or cache.default_models_folder(),
        report,
        stop,
        offline=wanted.offline,
        limit_bytes=wanted.cache_bytes,
    )
    # Nobody removes it as long as this process lives.
    cache.hold(folder)
    return folder


class HostGoneError(RuntimeError):
    """A host, or the agent on it, answers no more."""


@dataclass
class Host(ABC):
    """A host of a gang as its leader sees it.

    Every method raises HostGoneError when the host is gone, and UserError where the host says so.
    """

    ray_address: str
    hostname: str = ""
    facts: HostFacts | None = None
    """Once asked for."""
    agent_port: int = 0
    model_dir: Path | None = None
    round_trips: dict[str, float] = field(default_factory=dict)
    """Seconds, by host."""
    model_state: ModelState = field(default_factory=ModelState)

    @property
    def address(self) -> str:
        """By which ranks reach it."""
        return self.facts.address if self.facts is not None else self.ray_address

    @property
    def name(self) -> str:
        """As a person calls it."""
        hostname = self.facts.hostname if self.facts is not None else self.hostname
        return f"{self.address} ({hostname})" if hostname else self.address

    @abstractmethod
    async def call(self, method: str, *arguments: Any) -> Any:
        """One of HostWork's methods, by name."""

    @abstractmethod
    async def close(self) -> None:
        """End what runs on the host for this gang; a host that is gone already is fine."""
