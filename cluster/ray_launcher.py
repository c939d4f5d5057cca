"""Ranks as Ray actors: named, detached, in a detached placement group, so that they outlive who launched them."""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.host import HostGoneError
from cluster.launcher import Placed
from cluster.membership import Loss
from cluster.placement import NoRoomError, PlacementRequest
from cluster.processes import end_rank
from cluster.ray_errors import why_dead
from cluster.ray_room import RayRoom
from cluster.ray_runtime import NAMESPACE
from workers.config import RankConfig
from workers.rank_actor import RankActor

PREFIX = "caravan-"
PLACE_TIMEOUT_S = 60.0
# A bare worker process starts in seconds; on a machine under load in many.
SPAWN_TIMEOUT_S = 120.0
# For a host's agent to end a process, and for Ray to notice.
KILL_TIMEOUT_S = 3.0


class RayLauncher:
    """Starts and ends ranks of one gang; see `cluster.launcher.Launcher`.

    Args:
        env: environment of every rank's process beside the inherited one.
        request: what the gang needs.
        room: of the gang on a Ray of other hosts; None: all of Ray is on this host, and is ours.
        host: address of every rank, where there is no `room`.
    """

    def __init__(
        self, gang_id: str, env: Mapping[str, str], request: PlacementRequest, room: RayRoom | None, host: str
    ) -> None:
        self._gang_id = gang_id
        self._env = dict(env)
        self._request = request
        self._room = room
        self._host = host
        self._group: PlacementGroup | None = None
        self._actors: dict[tuple[int, int], Any] = {}
        self._ends: dict[tuple[int, int], asyncio.Task[Loss]] = {}
        self._pids: dict[tuple[int, int], int] = {}
        self._hosts: dict[tuple[int, int], str] = {}

    async def place(self, num_ranks: int) -> Placed:
        if self._room is not None:
            placed = await self._room.place()
            self._group = self._room.group
            return placed
        if self._group is None:
            self._group = await self._reserve(num_ranks)
        return Placed([self._host] * num_ranks)

    async def _reserve(self, num_ranks: int) -> PlacementGroup:
        request = self._request
        bundle = {"CPU": request.cpus} | ({"GPU": request.gpus} if request.gpus else {})
        group: PlacementGroup = placement_group(
            [bundle] * num_ranks, strategy="PACK", name=f"{PREFIX}{self._gang_id}", lifetime="detached"
        )
        try:
            await asyncio.wait_for(_finish(group.ready()), PLACE_TIMEOUT_S)
        except TimeoutError:
            remove_placement_group(group)
            free = ray.available_resources()  # type: ignore[no-untyped-call]
            room = {name: free.get(name, 0) for name in bundle}
            raise NoRoomError(
                f"Ray found no room for {num_ranks} ranks of {bundle} within {PLACE_TIMEOUT_S:g} s (free: {room}); "
                "ask for fewer ranks"
            ) from None
        return group

    async def launch(self, config: RankConfig) -> None:
        assert self._group is not None
        key = config.rank, config.incarnation
        self._actors[key] = RankActor.options(  # type: ignore[attr-defined]
            name=f"{PREFIX}{self._gang_id}-rank{config.rank}-{config.incarnation}",
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=self._request.cpus,
            num_gpus=self._request.gpus,
            max_restarts=0,
            max_concurrency=4,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, config.rank),
            **({"runtime_env": {"env_vars": self._env}} if self._env else {}),
        ).remote(config)
        self._hosts[key] = config.host
        self._ends[key] = asyncio.create_task(self._watch(key))

    async def ended(self, rank: int, incarnation: int) -> Loss:
        return await asyncio.shield(self._ends[rank, incarnation])

    async def kill(self, rank: int, incarnation: int) -> None:
        key = rank, incarnation
        actor = self._actors.pop(key, None)
        if actor is None:
            return
        ray.kill(actor, no_restart=True)
        end, pid, address = self._ends.pop(key), self._pids.pop(key, 0), self._hosts.pop(key)
        # Ray calls an actor dead before its process is; on the host itself that can be made certain.
        if self._room is None:
            await asyncio.to_thread(end_rank, pid)
            await asyncio.wait([end])
        elif (host := self._room.host_at(address)) and not self._room.is_shunned(host.ray_address):
            with contextlib.suppress(HostGoneError, TimeoutError):
                await asyncio.wait_for(host.call("kill", pid), KILL_TIMEOUT_S)
                await asyncio.wait([end], timeout=KILL_TIMEOUT_S)
        end.cancel()

    def shun(self, address: str) -> None:
        if self._room is not None:
            self._room.shun(address)

    async def close(self) -> None:
        """Give the reserved room back."""
        if self._room is not None:
            await self._room.close()
        elif self._group is not None:
            remove_placement_group(self._group)
        self._group = None

    async def _watch(self, key: tuple[int, int]) -> Loss:
        actor = self._actors[key]
        try:
            self._pids[key] = int(await asyncio.wait_for(_finish(actor.pid.remote()), SPAWN_TIMEOUT_S))
            # Returns only with the process: a rank ends its own.
            await _finish(actor.__ray_call__.remote(_join))
        except TimeoutError:
            return Loss(f"its process did not start within {SPAWN_TIMEOUT_S:g} s")
        except ray.exceptions.RayActorError as error:
            return Loss(why_dead(error))
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
