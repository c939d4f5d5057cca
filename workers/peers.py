"""The other ranks of an epoch, as who opens a step wakes them."""

import asyncio
import logging

import grpc

from protos import gang_pb2, gang_pb2_grpc

log = logging.getLogger(__name__)

WAKE_SECONDS = 30.0
OPTIONS = [
    # A rank may have the address of one that died: its connection must not wait for what the dead one's waited for.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class Peers:
    """Belongs to an event loop; every method is called on it."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._channels: dict[tuple[int, int], grpc.aio.Channel] = {}
        """By rank and incarnation."""

    async def enter(self, epoch: gang_pb2.Epoch) -> None:
        """These are the peers from now on; calls to those that are none any more are given up."""
        members = {(each.rank, each.incarnation): each.address for each in epoch.members if each.rank != self._rank}
        await self._close([key for key in self._channels if key not in members])
        for key, address in members.items():
            if key not in self._channels:
                self._channels[key] = grpc.aio.insecure_channel(address, options=OPTIONS)

    async def wake(self, gang_id: str, epoch: int, step: int) -> None:
        """Tell every peer that this rank opens a step."""
        request = gang_pb2.WakeRequest(gang_id=gang_id, epoch=epoch, step=step)
        names = [f"rank {rank}" for rank, _ in self._channels]
        calls = [
            gang_pb2_grpc.RankStub(channel).Wake(request, timeout=WAKE_SECONDS, wait_for_ready=True)
            for channel in self._channels.values()
        ]
        for name, result in zip(names, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(result, Exception):
                # The exchange will time out on that peer; the leader decides.
                log.warning("rank %d could not wake %s: %s", self._rank, name, result)

    async def close(self) -> None:
        await self._close(list(self._channels))

    async def _close(self, keys: list[tuple[int, int]]) -> None:
        for key in keys:
            await self._channels.pop(key).close(None)
