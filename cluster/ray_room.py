"""Room for a gang on a running Ray: a placement group pinned to the hosts of a plan, and an agent on each of them."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.host import Host, HostSpec
from cluster.host_agent import RayHost
from cluster.launcher import Placed
from cluster.placement import HostOffer, NoRoomError, PlacementRequest, Plan, bundles, plan
from cluster.ray_hosts import joined_hosts
from workers.errors import UserError

logger = logging.getLogger("caravan.leader")

POLL_S = 1.0
SHUN_S = 90.0
"""A host that was out of reach is not taken again for so long: Ray calls it dead after about 65 s."""


class RayRoom:
    """For one gang, from its first `place` to `close`.

    Args:
        name: of the placement group and, with a host's address behind it, of the agents; unique on this Ray.
        spec: what the agent of a host is told.
        timeout_s: until Ray has hosts with room for every rank.
    """

    def __init__(
        self, name: str, namespace: str, request: PlacementRequest, spec: Callable[[str], HostSpec], timeout_s: float
    ) -> None:
        self._name, self._namespace = name, namespace
        self._request, self._spec, self._timeout_s = request, spec, timeout_s
        self._plan: Plan | None = None
        self._hosts: dict[str, RayHost] = {}
        """By node id."""
        self._shunned: dict[str, tuple[float, str]] = {}
        """By address: until when, and the host's name."""
        self._starts = 0
        self.group: PlacementGroup | None = None

    async def place(self) -> Placed:
        """See `cluster.launcher.Launcher.place`."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            offers = self._usable(await asyncio.to_thread(joined_hosts))
            if self._plan is not None and {host.node_id for host in self._plan.hosts} <= {
                each.node_id for each in offers
            }:
                return self._placed(self._plan)
            if self.group is not None:
                # What it reserved comes free a moment later.
                remove_placement_group(self.group)
                self.group = self._plan = None
            _check_addresses(offers)
            try:
                found = plan(self._request, offers)
            except NoRoomError as error:
                if time.monotonic() > deadline:
                    raise NoRoomError(f"{error}{self._left()} (waited {self._timeout_s:g} s)") from None
            else:
                if await self._reserve(found, deadline):
                    self._plan = found
                    await self._start_agents(found)
                    return self._placed(found)
            await asyncio.sleep(POLL_S)

    def host_at(self, address: str) -> Host | None:
        """The host that ranks reach by `address`."""
        return next((host for host in self._hosts.values() if host.address == address), None)

    def shun(self, address: str) -> None:
        """See `cluster.launcher.Launcher.shun`."""
        name = next((host.name for host in self._hosts.values() if host.ray_address == address), address)
        self._shunned[address] = time.monotonic() + SHUN_S, name

    def is_shunned(self, address: str) -> bool:
        """Is it still out of reach, as far as is known?"""
        return self._shunned.get(address, (0.0, ""))[0] > time.monotonic()

    async def close(self) -> None:
        """Give the room back and end the agents."""
        hosts, self._hosts = list(self._hosts.values()), {}
        await asyncio.gather(*(host.close() for host in hosts), return_exceptions=True)
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = self._plan = None

    def _usable(self, offers: Sequence[HostOffer]) -> list[HostOffer]:
        now = time.monotonic()
        return [offer for offer in offers if self._shunned.get(offer.address, (0.0, ""))[0] < now]

    def _left(self) -> str:
        names = ", ".join(name for _, name in self._shunned.values())
        return f"; host {names} was lost" if names else ""

    async def _reserve(self, found: Plan, deadline: float) -> bool:
        """False where somebody else took the room meanwhile."""
        group = placement_group(**bundles(found), name=self._name, lifetime="detached")
        try:
            # A moment: the room was there.
            await asyncio.wait_for(_ready(group), max(5.0, min(15.0, deadline - time.monotonic())))
        except TimeoutError:
            remove_placement_group(group)
            logger.warning("the room for %s was there and is not any more", self._name)
            return False
        self.group = group
        return True

    async def _start_agents(self, found: Plan) -> None:
        wanted = {offer.node_id: offer for offer in found.hosts}
        for node_id in [each for each in self._hosts if each not in wanted]:
            await self._hosts.pop(node_id).close()
        for node_id, offer in wanted.items():
            if node_id not in self._hosts:
                self._starts += 1
                name = f"{self._name}-host-{offer.address}-{self._starts}"
                self._hosts[node_id] = RayHost(
                    node_id, offer.hostname, self._spec(offer.address), name, self._namespace
                )

    def _placed(self, found: Plan) -> Placed:
        order = dict.fromkeys(offer.node_id for offer in found.hosts)
        return Placed(found.addresses, [self._hosts[node_id] for node_id in order])


def _check_addresses(offers: Sequence[HostOffer]) -> None:
    for address, count in Counter(offer.address for offer in offers).items():
        if count > 1:
            names = " and ".join(
                sorted({offer.hostname or offer.node_id[:8] for offer in offers if offer.address == address})
            )
            raise UserError(
                f"{address} is the address of {count} hosts of this Ray ({names}); give each its own "
                "(`ray start --node-ip-address`)"
            )


async def _ready(group: PlacementGroup) -> None:
    await group.ready()
