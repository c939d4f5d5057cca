"""The Serve deployment whose one replica leads a gang."""

import asyncio
import contextlib
import importlib
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ray import serve

from cluster.epochs import Store
from cluster.host import HostSpec, WantedModel
from cluster.leader import Leader
from cluster.leader_config import LeaderConfig
from cluster.network import NetworkConfig, PortRange, address_of
from cluster.placement import PlacementConfig, PlacementRequest, gpus_per_rank
from cluster.ray_hosts import HEAD_RESOURCE, joined_hosts
from cluster.ray_launcher import PREFIX, RayLauncher, own_host, remove_leftovers
from cluster.ray_room import RayRoom
from cluster.ray_runtime import NAMESPACE
from workers.config import EngineConfig
from workers.model_config import ModelConfig

DEPLOYMENT = "Gang"
STORE_MODULE = "workers.rendezvous"


@dataclass(frozen=True)
class GangConfig:
    """What a gang's replica needs."""

    num_ranks: int
    engine: EngineConfig
    leader: LeaderConfig
    rank_env: Mapping[str, str]
    """Environment of every rank's process beside the inherited one."""
    host: str = ""
    """Address of leader and ranks, where all of Ray is on one host and ours; empty: it has hosts of its own."""
    model: WantedModel = field(default_factory=WantedModel)
    """What every host must have."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    metrics_folder: Path = Path()
    """Of every host's ranks."""
    metrics_port: int = 0
    """Where the agents of other hosts serve them."""
    served_from: str = ""
    """Ray's address of the host that `caravan serve` runs on, which serves its own metrics."""


class Gang:
    """Leads one gang for as long as the replica lives. Each life is a gang of its own, with a new id."""

    def __init__(self, config: GangConfig) -> None:
        remove_leftovers()
        if not config.host:
            # On a host that has no ranks nobody else makes it.
            config.metrics_folder.mkdir(parents=True, exist_ok=True)
        gang_id = f"gang-{secrets.token_hex(3)}"
        gpus = gpus_per_rank(config.engine.device, config.num_ranks, joined_hosts())
        engine = _on_devices(config.engine, gpus)
        request = PlacementRequest.of(config.num_ranks, config.placement, gpus=gpus)
        room = None
        if not config.host:

            def spec(address: str) -> HostSpec:
                port = 0 if address == config.served_from else config.metrics_port
                return HostSpec(address, config.network, config.metrics_folder, port, config.model)

            room = RayRoom(f"{PREFIX}{gang_id}", NAMESPACE, request, spec, config.leader.hosts_timeout_s)
        self._launcher = RayLauncher(gang_id, config.rank_env, request, room, config.host)
        self._leader = Leader(
            gang_id,
            config.host or _own_address(config.network),
            config.num_ranks,
            ModelConfig.from_folder(engine.model_dir),
            engine,
            config.leader,
            self._launcher,
            partial(_open_store, ports=config.network.store_ports),
            config.network,
        )
        self._start = asyncio.get_running_loop().create_task(self._leader.start())
        if config.num_ranks > 1 and engine.needs_store:
            # Their store needs torch, whose import takes seconds, in which ranks start.
            threading.Thread(target=importlib.import_module, args=(STORE_MODULE,), daemon=True).start()

    async def leader_address(self) -> str:
        """HOST:PORT of the leader's gRPC server."""
        return await self._start

    async def check_health(self) -> None:
        """Raises when a new replica would help; a gang that failed for good is none of those cases."""
        if self._start.done():
            self._start.result()

    async def __del__(self) -> None:
        """Serve awaits this when it stops the replica."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await self._start
                await self._leader.stop("the server is shutting down")
        await self._launcher.close()


def build_gang(config: GangConfig, env: Mapping[str, str]) -> Any:
    """The deployment, bound; `env` is the replica's environment beside the inherited one."""
    # Where Serve's controller is too: without Ray's head neither a rank nor a leader could be started anew.
    place = {} if config.host else {"resources": {HEAD_RESOURCE: 0.001}}
    deployment: Any = serve.deployment(
        Gang,
        name=DEPLOYMENT,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0} | place | ({"runtime_env": {"env_vars": dict(env)}} if env else {}),
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=6,
        health_check_period_s=2,
    )
    return deployment.bind(config)


def _own_address(network: NetworkConfig) -> str:
    """By which the gang's ranks reach this host."""
    return address_of(network.interface) if network.interface else own_host()


def _open_store(host: str, ports: PortRange | None) -> Store:
    store: Store = importlib.import_module(STORE_MODULE).RendezvousStore(host, ports)
    return store


def _on_devices(engine: EngineConfig, gpus: float) -> EngineConfig:
    """With its device decided: a GPU a rank, or none for anybody."""
    return replace(engine, device="cuda" if gpus else "cpu")
