"""The hosts of a gang, as its leader knows them: made ready before ranks start, and watched as long as they run."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from cluster.host import Host, HostGoneError, versions
from cluster.host_checks import check_facts, check_model, check_network, measure_round_trips
from cluster.launcher import Placed
from cluster.leader_config import LeaderConfig
from cluster.stages import Stage
from protos import gang_pb2

logger = logging.getLogger("caravan.leader")

WATCH_S = 0.25
ANSWER_S = 1.0
ROUND_TRIPS_S = 5.0
_MESSAGE = b"caravan?"


class GangHosts:
    """For one gang, on its leader's event loop. With no hosts (all ranks on the leader's own) nothing is asked.

    Args:
        enter: called as a stage of the start begins.
        changed: called when there is something new to see.
        gone: called once for a host that fell silent, with a sentence.
    """

    def __init__(
        self,
        config: LeaderConfig,
        enter: Callable[[Stage], None],
        changed: Callable[[], None],
        gone: Callable[[Host, str], None],
    ) -> None:
        self._config = config
        self._enter, self._changed, self._gone = enter, changed, gone
        self._hosts: Sequence[Host] = ()
        self._ranks: dict[str, list[int]] = {}
        self._watch: asyncio.Task[None] | None = None

    async def prepare(self, placed: Placed, leader_address: str) -> list[str]:
        """Everything that must be true before ranks start; returns each rank's host address.

        Raises:
            UserError: a host lacks something, in one sentence.
            HostGoneError: a host does not answer.
        """
        await self.stop_watching()
        self._hosts, config = placed.hosts, self._config
        if not self._hosts:
            return self._number(list(placed.host_of))
        self._enter(Stage.HOSTS_CHECKED)
        await check_facts(self._hosts, versions(), config.agents_timeout_s)
        address_of = {host.ray_address: host.address for host in self._hosts}
        addresses = self._number([address_of[address] for address in placed.host_of])
        self._enter(Stage.NETWORK)
        await check_network(self._hosts, Counter(addresses), leader_address, config.network_timeout_s)
        self._watch = asyncio.create_task(self._watch_all(), name="hosts")
        self._enter(Stage.CHECKPOINT)
        await self._unless_gone(check_model(self._hosts, config.load_stall_timeout_s, self._changed))
        return addresses

    def model_dir(self, address: str) -> Path | None:
        """Where the checkpoint lies on a host; None: where the leader's engine configuration says."""
        return next((host.model_dir for host in self._hosts if host.address == address), None)

    def name(self, address: str) -> str:
        """A host as a person calls it."""
        return next((host.name for host in self._hosts if host.address == address), address)

    def views(self) -> list[gang_pb2.HostView]:
        """What routers and operators see of them, ordered by their first rank."""
        hosts = {host.address: host for host in self._hosts}
        return [self._view(address, ranks, hosts.get(address)) for address, ranks in self._ranks.items()]

    async def stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None

    def _number(self, addresses: list[str]) -> list[str]:
        self._ranks = {}
        for rank, address in enumerate(addresses):
            self._ranks.setdefault(address, []).append(rank)
        return addresses

    @staticmethod
    def _view(address: str, ranks: list[int], host: Host | None) -> gang_pb2.HostView:
        if host is None or host.facts is None:
            return gang_pb2.HostView(host=address, ranks=ranks)
        return gang_pb2.HostView(
            host=address,
            hostname=host.facts.hostname,
            interface=host.facts.interface,
            ranks=ranks,
            bytes_fetched=host.model_state.bytes_done,
            bytes_to_fetch=host.model_state.bytes_total,
            round_trips=[
                gang_pb2.RoundTrip(host=other, seconds=seconds) for other, seconds in sorted(host.round_trips.items())
            ],
        )

    async def _unless_gone(self, work: Coroutine[Any, Any, None]) -> None:
        """`work`, given up when a host falls silent meanwhile."""
        assert self._watch is not None
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task, self._watch), return_when=asyncio.FIRST_COMPLETED)
            if self._watch.done():
                self._watch.result()
            await task
        finally:
            task.cancel()

    async def _watch_all(self) -> None:
        """Raises HostGoneError when a host has been silent for too long."""
        round_trips = asyncio.create_task(self._measure())
        watches = [asyncio.create_task(self._watch_one(host)) for host in self._hosts]
        try:
            await asyncio.gather(*watches)
        finally:
            for task in (round_trips, *watches):
                task.cancel()

    async def _watch_one(self, host: Host) -> None:
        """One open connection to the agent's port, over which it must echo."""
        heard = checked = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(ANSWER_S):
                    reader, writer = await asyncio.open_connection(host.address, host.agent_port)
                try:
                    while True:
                        writer.write(_MESSAGE)
                        async with asyncio.timeout(ANSWER_S):
                            await reader.readexactly(len(_MESSAGE))
                        heard = checked = time.monotonic()
                        await asyncio.sleep(WATCH_S)
                finally:
                    writer.close()
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                now = time.monotonic()
                # If it was this process that stood still, nobody else is to blame.
                heard = now if now - checked > 2 * ANSWER_S + WATCH_S else heard
                checked = now
                if (silent_s := now - heard) > self._config.host_silence_s:
                    message = f"host {host.name} has been silent for {silent_s:.1f} s"
                    logger.warning("%s (%s)", message, error)
                    self._gone(host, message)
                    raise HostGoneError(message) from None
                await asyncio.sleep(WATCH_S / 4)

    async def _measure(self) -> None:
        while True:
            await measure_round_trips(self._hosts)
            await asyncio.sleep(ROUND_TRIPS_S)
