"""A gang that changes while it runs: survivors keep what they have, and no token differs."""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from protos import gang_pb2
from tests.distributed.gang import Gang, Router, start_gang
from tests.exactness import Exactness, Written
from tests.local_engine import prompt
from workers.expert_map import ExpertMap

MEMORY = 16 * 2**20
SURVIVE = 5.0
"""Seconds of quiet in which a rank that is going to fail would."""


class Stream:
    """One sequence, wherever it runs."""

    def __init__(self, seed: int, max_tokens: int, prompt_tokens: int = 40) -> None:
        self.number, self.prompt_ids, self.max_tokens = seed, prompt(seed, prompt_tokens), max_tokens
        self._before: list[int] = []
        self._router: Router | None = None

    def submit(self, router: Router, epoch: int) -> None:
        self._before, self._router = self.outputs, router
        router.submit(self.number, self.prompt_ids, self.max_tokens, epoch=epoch, output_ids=self._before)

    @property
    def outputs(self) -> list[int]:
        return self._before + (self._router.outputs[self.number] if self._router else [])

    async def reaches(self, count: int) -> None:
        assert self._router is not None
        await self._router.wait(f"{count} tokens of stream {self.number}", lambda: len(self.outputs) >= count)

    async def finished(self) -> None:
        assert self._router is not None
        await self._router.all_finished([self.number])
        assert len(self.outputs) == self.max_tokens

    def check(self, exactness: Exactness, written: Written) -> None:
        exactness.check(written.reference, self.prompt_ids, self.outputs, f"stream {self.number}")


def submit_all(routers: dict[int, Router], per_rank: int, max_tokens: int, epoch: int = 1) -> dict[int, list[Stream]]:
    streams = {rank: [Stream(100 * rank + number, max_tokens) for number in range(per_rank)] for rank in routers}
    for rank, own in streams.items():
        for stream in own:
            stream.submit(routers[rank], epoch)
    return streams


async def all_finished(streams: dict[int, list[Stream]], exactness: Exactness, written: Written) -> None:
    for own in streams.values():
        for stream in own:
            await stream.finished()
            stream.check(exactness, written)


def assert_nobody_failed(gang: Gang, ranks: list[int]) -> None:
    assert not [failed.message for rank in ranks for failed in gang.leader.all_of(rank, "failed")]


async def test_a_rank_dies_and_returns_and_no_token_changes(maverick: Written, exactness: Exactness) -> None:
    async with start_gang(maverick.folder, 3, kv_memory_bytes=MEMORY) as gang:
        routers = {rank: Router(gang, rank) for rank in gang.ranks}
        streams = submit_all(routers, 2, 300)
        for own in streams.values():
            for stream in own:
                await stream.reaches(10)
        os.kill(gang.processes[1].pid, signal.SIGKILL)
        await gang.leader.wait("end of its lifeline", lambda: 1 in gang.leader.lost)
        await gang.reshape(2, [0, 2])
        # Its own streams go on with what they have; the dead one's, with what was sent of them.
        for rank, stream in zip((0, 2), streams[1], strict=True):
            assert 10 <= len(stream.outputs) < 300
            stream.submit(routers[rank], 2)
        for own in streams.values():
            for stream in own:
                await stream.reaches(len(stream.outputs) + 1)
        await gang.respawn(1)
        await gang.prepare(1, [0, 2])
        # The others know nothing of it.
        assert {ready.epoch for ready in gang.leader.all_of(0, "epoch_ready")} == {1, 2}
        late = [Stream(900 + rank, 120) for rank in (0, 2)]
        for rank, stream in zip((0, 2), late, strict=True):
            stream.submit(routers[rank], 2)
            await stream.reaches(1)
        await gang.reshape(3, [0, 1, 2])
        returned = Router(gang, 1, "router-after")
        streams[3] = [*late, Stream(950, 30)]
        streams[3][-1].submit(returned, 3)
        await all_finished(streams, exactness, maverick)
        assert {message.incarnation for message in returned.messages} == {21}
        for router in (routers[0], routers[2]):
            epochs = [message.epoch for message in router.messages]
            assert epochs == sorted(epochs) and {1, 2} <= set(epochs)
            for epoch in set(epochs):
                steps = [message.step for message in router.messages if message.epoch == epoch]
                assert steps == sorted(set(steps)), "one message a step"
            loads = [message.load for message in router.messages]
            for name in ("tokens_computed", "tokens_exchanged", "bytes_within_host"):
                totals = [getattr(load, name) for load in loads]
                assert totals == sorted(totals), f"{name} goes back"
        await gang.idle()
        assert_nobody_failed(gang, [0, 2])
        gang.stop()
        assert await gang.exit_codes(5) == dict.fromkeys(gang.ranks, 0)


async def test_two_deaths_at_once(maverick: Written, exactness: Exactness) -> None:
    async with start_gang(maverick.folder, 4, kv_memory_bytes=MEMORY) as gang:
        routers = {rank: Router(gang, rank) for rank in gang.ranks}
        streams = submit_all(routers, 2, 120)
        for own in streams.values():
            await own[0].reaches(5)
        await gang.kill(0, 3)
        await gang.reshape(2, [1, 2])
        for rank, dead in ((1, 0), (2, 3)):
            for stream in streams[dead]:
                stream.submit(routers[rank], 2)
        await all_finished(streams, exactness, maverick)
        # Down to one, which exchanges nothing, and up again.
        await gang.kill(2)
        await gang.reshape(3, [1])
        alone = {1: [Stream(500, 20)]}
        alone[1][0].submit(routers[1], 3)
        await all_finished(alone, exactness, maverick)
        for rank in (0, 2):
            await gang.respawn(rank)
            await gang.prepare(rank, [1])
        await gang.reshape(4, [0, 1, 2])
        again = {0: [Stream(501, 20)], 1: [Stream(502, 20)]}
        again[0][0].submit(Router(gang, 0, "again"), 4)
        again[1][0].submit(routers[1], 4)
        await all_finished(again, exactness, maverick)
        assert_nobody_failed(gang, [1])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_a_death_during_the_join_of_the_next_epoch(
    maverick: Written, exactness: Exactness, how: signal.Signals
) -> None:
    async with start_gang(maverick.folder, 4, kv_memory_bytes=MEMORY) as gang:
        routers = {rank: Router(gang, rank) for rank in gang.ranks}
        streams = submit_all(routers, 1, 120)
        for own in streams.values():
            await own[0].reaches(5)
        await gang.kill(1)
        # Of the three that are to go on, one does not; the others meet nobody or wait for it.
        os.kill(gang.processes[3].pid, how)
        gang.open_epoch(epoch=2, members=[0, 2, 3])
        await asyncio.sleep(0.3)
        assert not [ready for rank in (0, 2) for ready in gang.leader.all_of(rank, "epoch_ready") if ready.epoch == 2]
        started = time.monotonic()
        await gang.reshape(3, [0, 2])
        assert time.monotonic() - started < SURVIVE, "they waited for it all the same"
        await gang.kill(3, wait=False)
        for rank, dead in ((0, 1), (2, 3)):
            streams[dead][0].submit(routers[rank], 3)
        await all_finished(streams, exactness, maverick)
        assert_nobody_failed(gang, [0, 2])


@pytest.mark.parametrize(
    ("exchange", "hosts"),
    [("auto", []), ("tcp", []), ("torch", []), ("auto", ["127.0.0.1", "127.0.0.2", "127.0.0.2"])],
    ids=["shared", "tcp", "torch", "hosts"],
)
async def test_epochs_in_quick_succession_while_streams_run(
    maverick: Written, exactness: Exactness, exchange: str, hosts: list[str]
) -> None:
    """At any moment: while a rank joins, in the first exchange, in a step. Only the newest epoch need be entered."""
    chance = random.Random(5)
    async with start_gang(maverick.folder, 3, hosts=hosts, exchange=exchange, kv_memory_bytes=MEMORY) as gang:
        routers = {rank: Router(gang, rank) for rank in gang.ranks}
        streams = submit_all(routers, 2, 400)
        await streams[0][0].reaches(5)
        epoch = 1
        for _ in range(25):
            for _ in range(chance.randint(1, 3)):
                epoch += 1
                gang.open_epoch(epoch=epoch)
                await asyncio.sleep(chance.choice([0, 0, 0.001, 0.003, 0.01, 0.03]))
            if chance.random() < 0.5:
                await gang.entered(epoch, gang.ranks)
        await gang.entered(epoch, gang.ranks)
        # An old one changes nothing.
        assert gang.expert_map is not None
        for rank in gang.ranks:
            gang.leader.command(rank, epoch=gang_pb2.Epoch(epoch=epoch - 1, layers=gang.expert_map.to_proto()))
        await all_finished(streams, exactness, maverick)
        assert_nobody_failed(gang, gang.ranks)
        for rank in gang.ranks:
            entered = [ready.epoch for ready in gang.leader.all_of(rank, "epoch_ready")]
            assert entered == sorted(set(entered)) and entered[-1] == epoch


async def test_epochs_before_the_first_has_its_weights(maverick: Written, exactness: Exactness) -> None:
    async with start_gang(maverick.folder, 3, wait=False) as gang:
        for epoch in (1, 2, 3):
            gang.open_epoch(epoch=epoch)
        await gang.entered(3, gang.ranks)
        streams = {rank: [Stream(rank, 20)] for rank in gang.ranks}
        for rank, (stream,) in streams.items():
            stream.submit(Router(gang, rank), 3)
        await all_finished(streams, exactness, maverick)
        # One that joins, and whose epoch does not wait until it is prepared.
        await gang.kill(1)
        await gang.reshape(4, [0, 2])
        await gang.respawn(1)
        assert gang.expert_map is not None
        gang.leader.command(1, prepare=gang_pb2.Prepare(layers=gang.expert_map.over([0, 1, 2]).to_proto()))
        await gang.reshape(5, [0, 1, 2])
        # To one that runs: it is told to go on, and does.
        gang.leader.command(0, prepare=gang_pb2.Prepare(layers=gang.expert_map.to_proto()))
        streams = {rank: [Stream(10 + rank, 20)] for rank in gang.ranks}
        for rank, (stream,) in streams.items():
            stream.submit(Router(gang, rank, "later"), 5)
        await all_finished(streams, exactness, maverick)
        await gang.reshape(6, [0, 1, 2])
        assert_nobody_failed(gang, gang.ranks)


async def test_stop_while_a_rank_prepares(maverick: Written) -> None:
    async with start_gang(maverick.folder, 2) as gang:
        await gang.kill(1)
        await gang.reshape(2, [0])
        await gang.respawn(1)
        assert gang.expert_map is not None
        gang.leader.command(1, prepare=gang_pb2.Prepare(layers=gang.expert_map.over([0, 1]).to_proto()))
        gang.stop()
        assert await gang.exit_codes(8) == {0: 0, 1: 0}


async def test_an_epoch_whose_map_covers_too_little(maverick: Written) -> None:
    async with start_gang(maverick.folder, 2) as gang:
        gang.open_epoch(epoch=2, expert_map=ExpertMap(tuple(((7,),) * 16 for _ in range(4))))
        leader = gang.leader
        await leader.wait("failures", lambda: all(leader.all_of(rank, "failed") for rank in gang.ranks))
        for rank in gang.ranks:
            assert "expert 0 is on ranks (7,), none of which is a member" in leader.last(rank, "failed").message
        assert await gang.exit_codes(5) == {0: 1, 1: 1}


async def test_an_epoch_of_another_incarnation(maverick: Written) -> None:
    async with start_gang(maverick.folder, 1) as gang:
        assert gang.expert_map is not None
        member = gang_pb2.Member(rank=0, incarnation=99)
        gang.leader.command(0, epoch=gang_pb2.Epoch(epoch=2, members=[member], layers=gang.expert_map.to_proto()))
        await gang.leader.wait("failure", lambda: gang.leader.all_of(0, "failed"))
        assert gang.leader.last(0, "failed").message == "epoch 2 has no rank 0 of incarnation 10: it has 0 of 99"
        assert await gang.exit_codes(5) == {0: 1}


async def test_stop_in_the_middle_of_a_reshape(maverick: Written) -> None:
    chance = random.Random(6)
    async with start_gang(maverick.folder, 3, kv_memory_bytes=MEMORY) as gang:
        routers = {rank: Router(gang, rank) for rank in gang.ranks}
        streams = submit_all(routers, 2, 1000)
        await streams[0][0].reaches(5)
        for epoch in range(2, 6):
            gang.open_epoch(epoch=epoch)
            await asyncio.sleep(chance.choice([0, 0.005, 0.02]))
        gang.stop()
        assert await gang.exit_codes(8) == dict.fromkeys(gang.ranks, 0)


async def test_leader_that_goes_in_the_middle_of_a_reshape(maverick: Written) -> None:
    """One that will never come is awaited; the lifeline breaks."""
    async with start_gang(maverick.folder, 3, kv_memory_bytes=MEMORY) as gang:
        os.kill(gang.processes[0].pid, signal.SIGSTOP)
        gang.open_epoch(epoch=2)
        await asyncio.sleep(0.3)
        await gang.leader.close()
        deadline = time.monotonic() + 8
        while None in (gang.processes[1].exitcode, gang.processes[2].exitcode) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        assert [gang.processes[rank].exitcode for rank in (1, 2)] == [1, 1]


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    descriptors: Counter[str]
    """By kind."""
    threads: int
    mappings: int

    @classmethod
    def of(cls, pid: int) -> "Held":
        links = []
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                links.append(os.readlink(path))
        kinds = Counter(link.split(":")[0] if ":" in link else link for link in links)
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
        return cls(kinds, psutil.Process(pid).num_threads(), len(maps.splitlines()))


async def test_fifty_reshapes_of_an_idle_gang_leave_nothing_behind(maverick: Written, exactness: Exactness) -> None:
    async with start_gang(maverick.folder, 3) as gang:
        routers = {rank: Router(gang, rank) for rank in gang.ranks}

        async def serve(epoch: int) -> None:
            streams = {rank: [Stream(1000 * epoch + rank, 8)] for rank in gang.ranks}
            for rank, (stream,) in streams.items():
                stream.submit(routers[rank], epoch)
            await all_finished(streams, exactness, maverick)
            await gang.idle()

        for epoch in range(2, 8):  # What is made once is there after these.
            await gang.reshape(epoch, gang.ranks)
            await serve(epoch)
        await asyncio.sleep(1.5)
        before = {rank: Held.of(gang.processes[rank].pid) for rank in gang.ranks}
        for epoch in range(8, 58):
            await gang.reshape(epoch, gang.ranks)
        await serve(57)
        await asyncio.sleep(1.5)
        after = {rank: Held.of(gang.processes[rank].pid) for rank in gang.ranks}
        for rank in gang.ranks:
            # gRPC keeps connections to peers from the first wake on, and threads as it sees fit; the allocator may
            # split a few of its own. What every reshape left behind would be 50.
            more = after[rank].descriptors.total() - before[rank].descriptors.total()
            assert more <= 8, (before[rank], after[rank])
            assert after[rank].threads - before[rank].threads <= 4
            assert after[rank].mappings - before[rank].mappings <= 20, (before[rank], after[rank])
        # Parked in the newest epoch: nobody burns CPU.
        before_s, started = gang.cpu_seconds(), time.monotonic()
        await asyncio.sleep(1)
        for rank, seconds in gang.cpu_seconds().items():
            assert (seconds - before_s[rank]) / (time.monotonic() - started) < 0.05, f"rank {rank} burns CPU"
        assert_nobody_failed(gang, gang.ranks)
