"""Epochs of a gang: what its leader sends down the lifelines when members or expert maps change."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

from cluster.membership import Member
from protos import gang_pb2
from workers.expert_map import ExpertMap


class Store(Protocol):
    """A rendezvous store, one an epoch."""

    address: str
    """HOST:PORT"""

    def close(self) -> None: ...


class Epochs:
    """Begins one epoch after the other; each with a rendezvous store of its own, where its ranks need one.

    Args:
        open_store: makes a store, in a thread; None: ranks find each other by the addresses they joined with.
    """

    def __init__(self, open_store: Callable[[], Store] | None) -> None:
        self._open_store = open_store
        self._store: Store | None = None

    async def begin(self, epoch: int, members: Iterable[Member], expert_map: ExpertMap) -> None:
        """Tell every member; it enters the epoch as soon as it hears of it, whatever step it is in."""
        members = sorted(members, key=lambda member: member.rank)
        self.close()
        if len(members) > 1 and self._open_store is not None:
            self._store = await asyncio.to_thread(self._open_store)
        command = gang_pb2.LeaderCommand(
            epoch=gang_pb2.Epoch(
                epoch=epoch,
                members=[_described(member) for member in members],
                store_address=self._store.address if self._store is not None else "",
                layers=expert_map.to_proto(),
            )
        )
        for member in members:
            member.commands.put_nowait(command)

    def close(self) -> None:
        """The present epoch's store is not needed any more."""
        if self._store is not None:
            self._store.close()
            self._store = None


def _described(member: Member) -> gang_pb2.Member:
    joined = member.joined
    assert joined is not None, "a member that never joined"
    return gang_pb2.Member(
        rank=member.rank,
        incarnation=member.incarnation,
        address=joined.address,
        host=joined.host,
        exchange_address=joined.exchange_address,
    )
