"""Peers are woken wherever their newest incarnation listens."""

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import pytest

from protos import gang_pb2, gang_pb2_grpc
from workers.peers import Peers


class Woken(gang_pb2_grpc.RankServicer):
    """A rank that only listens for wakes."""

    def __init__(self) -> None:
        self.wakes: asyncio.Queue[gang_pb2.WakeRequest] = asyncio.Queue()
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        gang_pb2_grpc.add_RankServicer_to_server(self, self._server)
        self.port = 0

    async def start(self, port: int = 0) -> "Woken":
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()
        return self

    async def stop(self) -> None:
        await self._server.stop(0)

    async def Wake(self, request: gang_pb2.WakeRequest, context: object) -> gang_pb2.WakeResponse:
        self.wakes.put_nowait(request)
        return gang_pb2.WakeResponse()


def epoch(*members: tuple[int, int, int]) -> gang_pb2.Epoch:
    """Of (rank, incarnation, port)."""
    return gang_pb2.Epoch(
        epoch=4,
        members=[
            gang_pb2.Member(rank=rank, incarnation=incarnation, address=f"127.0.0.1:{port}")
            for rank, incarnation, port in members
        ],
    )


@pytest.fixture
async def peers() -> AsyncIterator[Peers]:
    peers = Peers(0)
    yield peers
    await peers.close()


async def test_every_peer_is_woken_and_nobody_else(peers: Peers) -> None:
    ranks = [await Woken().start() for _ in range(3)]
    await peers.enter(epoch((0, 10, ranks[0].port), (1, 11, ranks[1].port), (2, 12, ranks[2].port)))
    await peers.wake("gang", 4, 7)
    for woken in ranks[1:]:
        assert await woken.wakes.get() == gang_pb2.WakeRequest(gang_id="gang", epoch=4, step=7)
    await peers.enter(epoch((0, 10, ranks[0].port), (2, 12, ranks[2].port)))
    await peers.wake("gang", 5, 8)
    assert (await ranks[2].wakes.get()).epoch == 5
    assert ranks[0].wakes.empty()
    assert ranks[1].wakes.empty()
    for woken in ranks:
        await woken.stop()


async def test_a_new_incarnation_at_the_address_of_the_dead_one(peers: Peers, caplog: pytest.LogCaptureFixture) -> None:
    dead = await Woken().start()
    await peers.enter(epoch((1, 11, dead.port)))
    await peers.wake("gang", 4, 1)
    await dead.stop()
    waiting = asyncio.create_task(peers.wake("gang", 4, 2))
    # So long that the old connection backs off.
    await asyncio.sleep(1.5)
    assert not waiting.done()
    with caplog.at_level(logging.WARNING):
        await peers.enter(epoch((1, 21, dead.port)))
        await asyncio.wait_for(waiting, 5)
    assert not caplog.records, "a call that was given up is no failure"
    again = await Woken().start(dead.port)
    await asyncio.wait_for(peers.wake("gang", 5, 2), 5)
    assert (await again.wakes.get()).step == 2
    assert again.wakes.empty(), "a wake of the dead one's reached its successor"
    await again.stop()
