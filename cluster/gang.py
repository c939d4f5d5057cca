"""The Serve deployment whose one replica leads a gang."""

import asyncio
import contextlib
import importlib
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import serve

from cluster.leader import Leader, LeaderConfig, Store
from cluster.ray_launcher import RayLauncher, own_host, remove_leftovers
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
    """Address of leader and ranks, where all of Ray is on one host; empty: Ray's own addresses of its hosts."""


class Gang:
    """Leads one gang for as long as the replica lives. Each life is a gang of its own, with a new id."""

    def __init__(self, config: GangConfig) -> None:
        remove_leftovers()
        gang_id = f"gang-{secrets.token_hex(3)}"
        engine, gpus_per_rank = _devices(config.engine, config.num_ranks)
        self._launcher = RayLauncher(gang_id, config.rank_env, gpus_per_rank, config.host)
        self._leader = Leader(
            gang_id,
            config.host or own_host(),
            config.num_ranks,
            ModelConfig.from_folder(engine.model_dir),
            engine,
            config.leader,
            self._launcher,
            _open_store,
        )
        self._start = asyncio.get_running_loop().create_task(self._leader.start())
        if config.num_ranks > 1:
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
    deployment: Any = serve.deployment(
        Gang,
        name=DEPLOYMENT,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0} | ({"runtime_env": {"env_vars": dict(env)}} if env else {}),
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=6,
        health_check_period_s=2,
    )
    return deployment.bind(config)


def _open_store(host: str) -> Store:
    store: Store = importlib.import_module(STORE_MODULE).RendezvousStore(host)
    return store


def _devices(engine: EngineConfig, num_ranks: int) -> tuple[EngineConfig, int]:
    """A GPU a rank where the cluster has that many, else none for anybody."""
    if engine.device == "cpu":
        return engine, 0
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    if engine.device == "cuda" or resources.get("GPU", 0) >= num_ranks:
        return replace(engine, device="cuda"), 1
    return replace(engine, device="cpu"), 0
