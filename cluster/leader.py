"""The leader of a gang: starts its ranks, gives them an epoch and its expert maps, and decides who is dead.

Knows no Ray: processes come from a `Launcher`. One life of a gang is

    hosts ready → ranks launched and joined → first epoch → all ready → reshapes, as ranks go and come (reshape.py)

A gang that cannot go on is fenced as a whole and starts over with the next epoch and new incarnations, a bounded number
of times; where the user's input is at fault it fails for good at once.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from cluster.epochs import Epochs, Store
from cluster.errors import one_sentence
from cluster.gang_hosts import GangHosts
from cluster.gang_ranks import GangRanks
from cluster.host import Host
from cluster.launcher import Launcher
from cluster.leader_config import LeaderConfig
from cluster.leader_service import LeaderService
from cluster.membership import FAILED, READY, STARTING, Loss, Member, Membership
from cluster.network import NetworkConfig
from cluster.placement import NoRoomError, first_expert_map, ranks_on_same_host
from cluster.reshape import Reshaper
from cluster.stages import Stage
from protos import gang_pb2
from workers.config import EngineConfig
from workers.errors import UserError
from workers.expert_map import ExpertMap
from workers.model_config import ModelConfig

logger = logging.getLogger("caravan.leader")

ANY_PORTS = NetworkConfig()


class _GangLostError(Exception):
    """This life of the gang is over."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss.message)
        self.loss = loss


class Leader:
    """Leads one gang from `start` to `stop`; both, and everything between, on one event loop.

    Args:
        gang_id: unique among all gangs that ever lived, so that nothing of another one can be taken for this one's.
        host: address on which the leader's gRPC server and the rendezvous stores listen.
        open_store: makes a rendezvous store on a host; called in a thread, once an epoch.
        network: ports of the leader and the ranks.
    """

    def __init__(
        self,
        gang_id: str,
        host: str,
        num_ranks: int,
        model: ModelConfig,
        engine: EngineConfig,
        config: LeaderConfig,
        launcher: Launcher,
        open_store: Callable[[str], Store],
        network: NetworkConfig = ANY_PORTS,
    ) -> None:
        self._host = host
        self._num_ranks = num_ranks
        self._model = model
        self._engine = engine
        self._config = config
        self._launcher = launcher
        self._epochs = Epochs(partial(open_store, host) if num_ranks > 1 and engine.needs_store else None)
        self._network = network
        self.membership = membership = Membership(gang_id)
        self._hosts = GangHosts(config, membership.enter, membership.notify, self._on_host_gone)
        membership.host_views = self._hosts.views
        self._was_ready = False
        self._service = LeaderService(self.membership)
        self._expert_map: ExpertMap | None = None
        self._ranks: GangRanks | None = None
        self._task: asyncio.Task[None] | None = None
        self.address = ""

    async def start(self) -> str:
        """Serve `Leader` and begin to form the gang; returns HOST:PORT at once.

        Raises:
            UserError: more ranks than experts.
        """
        self._expert_map = first_expert_map(self._model, range(self._num_ranks))
        self.address = await self._service.start(self._host, self._network.leader_port)
        self._ranks = GangRanks(
            self.membership,
            self._launcher,
            self._hosts,
            self._engine,
            self._network,
            self.address,
            self._config.fence_timeout_s,
        )
        self._task = asyncio.create_task(self._lead(self._ranks), name="leader")
        return self.address

    async def stop(self, reason: str) -> None:
        """Ask every rank to stop, kill those that have not in time, and close the server."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        command = gang_pb2.LeaderCommand(stop=gang_pb2.Stop(reason=reason))
        for member in self.membership.everybody():
            member.commands.put_nowait(command)
        try:
            if self._ranks is not None:
                await self._ranks.wait_ended(self._config.stop_timeout_s)
                await self._fence(self._ranks)
        finally:
            await self._hosts.stop_watching()
            await self._service.stop()

    async def _lead(self, ranks: GangRanks) -> None:
        losses: deque[float] = deque()
        try:
            while True:
                loss = await self._live(ranks)
                membership = self.membership
                logger.warning("gang %s lost in epoch %d: %s", membership.gang_id, membership.epoch, loss.message)
                if not loss.is_user_error:
                    self.membership.settle(STARTING, f"starting over: {loss.message}")
                await self._fence(ranks)
                now = time.monotonic()
                losses.append(now)
                while now - losses[0] > self._config.restart_window_s:
                    losses.popleft()
                if loss.is_final or loss.is_user_error or len(losses) > self._config.restarts:
                    await self._hosts.stop_watching()
                    self.membership.settle(FAILED, loss.message, loss.is_user_error)
                    return
                await asyncio.sleep(self._config.restart_delay_s)
        except Exception as error:
            logger.exception("the leader failed")
            with contextlib.suppress(Exception):
                await self._fence(ranks)
            self.membership.settle(FAILED, f"the gang's leader failed: {one_sentence(error)}")

    async def _live(self, ranks: GangRanks) -> Loss:
        try:
            addresses = await self._form(ranks)
        except _GangLostError as lost:
            return lost.loss
        self.membership.settle(READY)
        self._was_ready = True
        assert self._expert_map is not None
        reshaper = Reshaper(self.membership, ranks, self._epochs, self._expert_map, addresses, self._config)
        return await reshaper.run()

    async def _form(self, ranks: GangRanks) -> dict[int, str]:
        """Every rank started and ready in one epoch; returns the addresses of their hosts."""
        config, membership = self._config, self.membership
        assert self._expert_map is not None
        epoch = membership.epoch + 1
        # Incarnations are no older than the epoch that starts them.
        incarnation = membership.next_incarnation()
        membership.begin(epoch, dict.fromkeys(range(self._num_ranks), incarnation))
        for rank, member in membership.members.items():
            member.experts = self._expert_map.most_experts(rank)
        addresses = await self._launch_all(ranks)
        await self._until(lambda member: member.joined is not None, config.join_timeout_s, "joined the gang")
        await self._epochs.begin(epoch, membership.members.values(), self._expert_map)
        membership.enter(Stage.WEIGHTS)
        await self._until(
            lambda member: member.is_at(gang_pb2.Progress.STAGE_GROUP),
            config.load_stall_timeout_s,
            "loaded its weights",
        )
        membership.enter(Stage.GROUP)
        await self._until(
            lambda member: member.is_at(gang_pb2.Progress.STAGE_FIRST_EXCHANGE),
            config.group_timeout_s,
            "connected with the other ranks",
        )
        membership.enter(Stage.FIRST_EXCHANGE)
        await self._until(
            lambda member: member.ready is not None, config.first_exchange_timeout_s, "done its first exchange"
        )
        return addresses

    async def _launch_all(self, ranks: GangRanks) -> dict[int, str]:
        try:
            self.membership.enter(Stage.HOSTS_JOINED)
            placed = await self._launcher.place(self._num_ranks)
            addresses = await self._hosts.prepare(placed, self.address)
            self.membership.enter(Stage.RANKS_PLACED)
            on_host = ranks_on_same_host(addresses)
            members = self.membership.members
            await asyncio.gather(*(ranks.launch(members[n], addresses[n], on_host[n]) for n in sorted(members)))
            return dict(enumerate(addresses))
        except NoRoomError as error:
            # Room that was there and is not any more may come back; room that never was has been waited for.
            raise _GangLostError(Loss(str(error), is_final=not self._was_ready)) from None
        except UserError as error:
            raise _GangLostError(Loss(str(error), is_user_error=True)) from None
        except (RuntimeError, OSError, TimeoutError) as error:
            raise _GangLostError(Loss(f"the ranks could not be started: {one_sentence(error)}")) from error

    def _on_host_gone(self, host: Host, message: str) -> None:
        self._launcher.shun(host.ray_address)
        for member in self.membership.everybody():
            if member.host == host.name:
                self.membership.record_loss(member.rank, member.incarnation, Loss(message, reason="host", is_told=True))

    async def _until(self, has: Callable[[Member], bool], bound_s: float, what: str) -> None:
        """Wait until `has` is true of every rank; bytes read or packed start the bound anew."""
        membership = self.membership
        version, bytes_read, deadline = membership.version, 0, time.monotonic() + bound_s
        while lacking := membership.lacking(has):
            if membership.losses():
                await self._give_up()
            if (progress := self._bytes_read()) > bytes_read:
                bytes_read, deadline = progress, time.monotonic() + bound_s
            if time.monotonic() > deadline:
                raise _GangLostError(Loss(f"{membership.named(lacking)} has not {what} within {bound_s:g} s"))
            membership.detail = f"waiting until {membership.named(lacking)} has {what}"
            version = await membership.changed_since(version, timeout_s=min(0.5, bound_s))
        if membership.losses():
            await self._give_up()

    def _bytes_read(self) -> int:
        loadings = [member.loading for member in self.membership.members.values() if member.loading]
        return sum(loading.bytes_read + loading.bytes_packed for loading in loadings)

    async def _give_up(self) -> NoReturn:
        """Raise why this life ended. One death makes the others' exchanges fail, so all get a moment to speak."""
        await asyncio.sleep(0.3)
        # A checkpoint at fault explains everything; then a rank that fell silent; then who complained first.
        member, loss = min(self.membership.losses(), key=lambda found: (not found[1].is_user_error, found[1].is_told))
        raise _GangLostError(Loss(f"rank {member.rank}: {one_sentence(loss.message)}", loss.is_user_error))

    async def _fence(self, ranks: GangRanks) -> None:
        """No process of this gang acts after this.

        Raises:
            TimeoutError: one could not be killed in time.
        """
        await ranks.fence(self.membership.everybody())
        self._epochs.close()
