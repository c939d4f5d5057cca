"""The router as a Ray Serve deployment. Serve starts, watches, replaces and ends it; clients come to its own doors.

No request passes through Serve: its ingress is switched off (see DESIGN.md, Front doors).
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from router.config import RouterConfig
from router.doors import Doors
from router.gang_view import LeaderResolver
from router.metrics import RouterMetrics
from router.service import RouterService

STOP_S = 2.0
GRACE_S = 1.0
"""Bounds how long closed doors wait for calls to end; `close` ends them."""


class Router:
    """One router replica, listening from its construction to its end.

    Args:
        config: what is served, where, and the bounds.
        gangs: a handle to each gang's leader deployment, which has `leader_address() -> "HOST:PORT"`.

    Raises:
        RouterConfigError: the checkpoint cannot be served, or a port is in use.
    """

    async def __init__(self, config: RouterConfig, *gangs: DeploymentHandle[Any]) -> None:  # type: ignore[misc]
        # Serve awaits it.
        self._core = RouterService(config, [_resolver(handle) for handle in gangs], RouterMetrics())
        self._doors = Doors(self._core, config)
        try:
            await self._doors.start()
        except BaseException:
            await self._core.close()
            raise

    async def close(self) -> None:
        """Closes the doors, then ends every stream with UNAVAILABLE: who comes back finds another replica."""
        closing = asyncio.ensure_future(self._doors.stop(GRACE_S))
        await asyncio.sleep(GRACE_S / 10)
        await self._core.close()
        await closing

    async def check_health(self) -> None:
        """Raises when a new replica would help; that a gang is down is none of those cases."""
        if not self._core.is_alive:
            raise RuntimeError("a task of the router ended; a new replica is needed")
        if not self._doors.is_alive:
            raise RuntimeError("the router listens no more; a new replica is needed")

    async def __del__(self) -> None:
        """Serve awaits this when it stops the replica."""
        await self.close()


def build_router(
    config: RouterConfig,
    gangs: Sequence[Any],
    num_cpus: float = 0.1,
    num_replicas: int = 1,
    env: Mapping[str, str] | None = None,
    host: str = "",
) -> serve.Application:
    """The Serve application to run.

    Args:
        config: what is served and the bounds.
        gangs: the bound leader deployments, one a gang.
        num_cpus: logical CPUs a replica claims.
        num_replicas: router processes; those of one host share its ports.
        env: environment variables of the replicas alone, such as PROMETHEUS_MULTIPROC_DIR.
        host: Ray's address of the host that all of them run on; empty: any.
    """
    # Ray gives every host a resource of its name.
    place = {"resources": {f"node:{host}": 0.001}} if host else {}
    decorate = serve.deployment(
        name="Router",
        num_replicas=num_replicas,
        ray_actor_options={"num_cpus": num_cpus} | place | ({"runtime_env": {"env_vars": dict(env)}} if env else {}),
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=STOP_S,
        health_check_period_s=2,
    )
    deployment: serve.Deployment = decorate(Router)
    return deployment.bind(config, *gangs)


def _resolver(handle: DeploymentHandle[Any]) -> LeaderResolver:
    async def resolve() -> str:
        return str(await handle.leader_address.remote())

    return resolve
