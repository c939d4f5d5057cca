"""Ranks as Ray actors: named, detached, in a detached placement group, so that they outlive who launched them."""

import asyncio
import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import one_sentence
from cluster.membership import Loss
from cluster.ray_runtime import NAMESPACE
from workers.config import RankConfig
from workers.rank_actor import RankActor

PREFIX = "caravan-"
PLACE_TIMEOUT_S = 60.0
# A bare worker process starts in seconds; on a machine under load in many.
SPAWN_TIMEOUT_S = 120.0


class RayLauncher:
    """Starts and ends ranks of one gang; see `cluster.leader.Launcher`.

    Args:
        env: environment of every rank's process beside the inherited one.
        gpus_per_rank: 1 where ranks compute on CUDA, else 0.
        host: address of every rank, where all of Ray is on one host that has a better one; empty: Ray's own addresses.
    """

    def __init__(self, gang_id: str, env: Mapping[str, str], gpus_per_rank: int, host: str) -> None:
        self._gang_id = gang_id
        self._env = dict(env)
        self._gpus_per_rank = gpus_per_rank
        self._host = host
        self._group: PlacementGroup | None = None
        self._actors: dict[tuple[int, int], Any] = {}
        self._ends: dict[tuple[int, int], asyncio.Task[Loss]] = {}
        self._processes: dict[tuple[int, int], psutil.Process] = {}

    async def place(self, num_ranks: int) -> Sequence[str]:
        if self._group is None:
            bundle = {"CPU": 1.0} | ({"GPU": float(self._gpus_per_rank)} if self._gpus_per_rank else {})
            group = placement_group(
                [bundle] * num_ranks, strategy="PACK", name=f"{PREFIX}{self._gang_id}", lifetime="detached"
            )
            try:
                await asyncio.wait_for(_finish(group.ready()), PLACE_TIMEOUT_S)
            except TimeoutError:
                remove_placement_group(group)
                free = ray.available_resources()  # type: ignore[no-untyped-call]
                room = {name: free.get(name, 0) for name in bundle}
                raise RuntimeError(
                    f"Ray found no room for {num_ranks} ranks of {bundle} within {PLACE_TIMEOUT_S:g} s (free: {room}); "
                    "add hosts or ask for fewer ranks"
                ) from None
            self._group = group
        if self._host:
            return [self._host] * num_ranks
        nodes = placement_group_table(self._group)["bundles_to_node_id"]
        addresses = _host_addresses()
        return [addresses[nodes[rank]] for rank in range(num_ranks)]

    async def launch(self, config: RankConfig) -> None:
        assert self._group is not None
        key = config.rank, config.incarnation
        self._actors[key] = RankActor.options(  # type: ignore[attr-defined]
            name=f"{PREFIX}{self._gang_id}-rank{config.rank}-{config.incarnation}",
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=1,
            num_gpus=self._gpus_per_rank,
            max_restarts=0,
            max_concurrency=4,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, config.rank),
            **({"runtime_env": {"env_vars": self._env}} if self._env else {}),
        ).remote(config)
        self._ends[key] = asyncio.create_task(self._watch(key, config.host))

    async def ended(self, rank: int, incarnation: int) -> Loss:
        return await asyncio.shield(self._ends[rank, incarnation])

    async def kill(self, rank: int, incarnation: int) -> None:
        key = rank, incarnation
        actor = self._actors.pop(key, None)
        if actor is None:
            return
        ray.kill(actor, no_restart=True)
        if process := self._processes.pop(key, None):
            # Ray calls an actor dead before its process is; on this host that can be made certain.
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
            await asyncio.to_thread(_wait_gone, process)
        await asyncio.wait([self._ends.pop(key)])

    async def close(self) -> None:
        """Give the reserved room back."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    async def _watch(self, key: tuple[int, int], host: str) -> Loss:
        actor = self._actors[key]
        try:
            pid = int(await asyncio.wait_for(_finish(actor.pid.remote()), SPAWN_TIMEOUT_S))
            # On another host the number says nothing here.
            if host in (self._host, own_host()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._processes[key] = psutil.Process(pid)
            # Returns only with the process: a rank ends its own.
            await _finish(actor.__ray_call__.remote(_join))
        except TimeoutError:
            return Loss(f"its process did not start within {SPAWN_TIMEOUT_S:g} s")
        except ray.exceptions.RayActorError as error:
            return Loss(_cause(error))
        return Loss("its process ended")


def own_host() -> str:
    """Address by which the hosts of this Ray reach this one."""
    return _host_addresses()[ray.get_runtime_context().get_node_id()]


def remove_leftovers() -> None:
    """End every rank and placement group that an earlier leader on this Ray left. Only for who is the only leader."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(PREFIX):
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(actor["name"], namespace=NAMESPACE))
    for group in placement_group_table().values():
        if group["name"].startswith(PREFIX) and group["state"] != "REMOVED":
            group_id = ray.PlacementGroupID(bytes.fromhex(group["placement_group_id"]))
            remove_placement_group(PlacementGroup(group_id))


def _host_addresses() -> dict[str, str]:
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}  # type: ignore[no-untyped-call]


async def _finish(reference: Any) -> Any:
    return await reference


def _join(actor: Any) -> None:
    """Runs in the rank's process, which ends before this returns."""
    actor._thread.join()


def _wait_gone(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
        process.wait(5)


def _cause(error: Exception) -> str:
    """The last line that says anything of Ray's long story."""
    text = str(error)
    if "creation task" in text:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f"its process could not start: {one_sentence(lines[-1], 300)}"
    if re.search(r"out of memory|OOM", text):
        return "its process died, probably for want of memory"
    return "its process died"
