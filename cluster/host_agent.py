"""A host's agent as a Ray actor, and a handle to it: see `cluster.host`."""

import asyncio
import contextlib
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.host import Host, HostGoneError, HostSpec, HostWork
from cluster.metrics_endpoint import ENVIRONMENT_VARIABLE
from cluster.ray_errors import why_dead
from workers.errors import UserError

CLOSE_BOUND_S = 3.0


@ray.remote(num_cpus=0, max_restarts=0)
class HostAgent:
    """HostWork in a process of its own on its host."""

    def __init__(self, spec: HostSpec) -> None:
        self._work = HostWork(spec)

    def call(self, method: str, *arguments: Any) -> Any:
        """A method of HostWork. A user's error comes back as a value: Ray would wrap an exception in its story."""
        try:
            return getattr(self._work, method)(*arguments)
        except UserError as error:
            return error


class RayHost(Host):
    """A host of a Ray cluster, with an agent started on it at once.

    Args:
        name: the actor's, unique on this Ray.
    """

    def __init__(self, node_id: str, hostname: str, spec: HostSpec, name: str, namespace: str) -> None:
        super().__init__(spec.ray_address, hostname)
        self.node_id = node_id
        self._agent = HostAgent.options(  # type: ignore[attr-defined]
            name=name,
            namespace=namespace,
            lifetime="detached",
            max_concurrency=8,
            runtime_env={"env_vars": {ENVIRONMENT_VARIABLE: str(spec.metrics_folder)}},
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        ).remote(spec)

    async def call(self, method: str, *arguments: Any) -> Any:
        try:
            answer = await self._agent.call.remote(method, *arguments)
        except ray.exceptions.RayError as error:
            raise HostGoneError(f"host {self.name} is gone: its agent does not answer, {why_dead(error)}") from error
        if isinstance(answer, UserError):
            raise UserError(f"host {self.name}: {answer}")
        return answer

    async def close(self) -> None:
        with contextlib.suppress(HostGoneError, TimeoutError):
            await asyncio.wait_for(self.call("close"), CLOSE_BOUND_S)
        ray.kill(self._agent, no_restart=True)
