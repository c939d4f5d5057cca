"""The processes of a gang's ranks, as its leader starts, watches and ends them."""

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import replace

from cluster.gang_hosts import GangHosts
from cluster.launcher import Launcher
from cluster.membership import Loss, Member, Membership
from cluster.network import NetworkConfig
from workers.config import EngineConfig, RankConfig


class GangRanks:
    """On the leader's event loop.

    Args:
        leader_address: HOST:PORT to which ranks hold their lifelines.
        fence_timeout_s: until a killed rank's process must be gone.
    """

    def __init__(
        self,
        membership: Membership,
        launcher: Launcher,
        hosts: GangHosts,
        engine: EngineConfig,
        network: NetworkConfig,
        leader_address: str,
        fence_timeout_s: float,
    ) -> None:
        self._membership, self._launcher, self._hosts = membership, launcher, hosts
        self._engine, self._network, self._leader_address = engine, network, leader_address
        self._fence_timeout_s = fence_timeout_s
        self._watchers: dict[tuple[int, int], asyncio.Task[None]] = {}

    async def launch(self, member: Member, address: str, ranks_on_host: int) -> None:
        """Start one incarnation on the host that ranks reach by `address`.

        Raises:
            RuntimeError: Ray did not take it.
        """
        member.address, member.host = address, self._hosts.name(address)
        model_dir = self._hosts.model_dir(address)
        await self._launcher.launch(
            RankConfig(
                gang_id=self._membership.gang_id,
                rank=member.rank,
                incarnation=member.incarnation,
                leader_address=self._leader_address,
                host=address,
                ranks_on_host=ranks_on_host,
                rank_ports=self._network.rank_ports,
                exchange_ports=self._network.exchange_ports,
                engine=replace(self._engine, model_dir=model_dir) if model_dir is not None else self._engine,
            )
        )
        key = member.rank, member.incarnation
        self._watchers[key] = asyncio.create_task(self._watch(*key))

    async def fence(self, members: Iterable[Member]) -> None:
        """None of these acts after this, or is heard.

        Raises:
            TimeoutError: one could not be killed in time.
        """
        gone = list(members)
        async with asyncio.timeout(self._fence_timeout_s):
            await asyncio.gather(*(self._launcher.kill(member.rank, member.incarnation) for member in gone))
        for member in gone:
            if task := self._watchers.pop((member.rank, member.incarnation), None):
                task.cancel()
            self._membership.record_loss(member.rank, member.incarnation, Loss("fenced with the rest of the gang"))

    async def wait_ended(self, timeout_s: float) -> None:
        """Until every process has ended, no longer than `timeout_s`."""
        if self._watchers:
            await asyncio.wait(self._watchers.values(), timeout=timeout_s)

    async def _watch(self, rank: int, incarnation: int) -> None:
        try:
            loss = await self._launcher.ended(rank, incarnation)
            # What the rank said last may still be on its way up the lifeline, and tells more than a mere end.
            await asyncio.sleep(0.2)
            self._membership.record_loss(rank, incarnation, loss)
        finally:
            with contextlib.suppress(KeyError):
                del self._watchers[rank, incarnation]
