"""How a load is put on a server."""

import asyncio
import time
from collections.abc import Sequence

import pytest

from cluster.bench_drive import drive, drive_open, warm_up
from cluster.bench_load import LONG_PROMPTS, WARM_UP_REQUESTS, Load, Mix, Prompts, Shape
from cluster.bench_stream import Stream
from cluster.bench_target import Facts


class FakeTarget:
    """Answers after a few turns of the loop."""

    address = "fake"

    def __init__(self) -> None:
        self.prompts: list[Sequence[int]] = []
        self.now = self.most_at_once = self.cancelled = 0
        self.delay_s = 0.0
        self.error = ""

    async def open(self) -> Facts:
        return Facts("fake", 8000, None, is_caravan=False)

    async def close(self) -> None:
        pass

    async def stream(self, prompt: Sequence[int], output_tokens: int) -> Stream:
        stream = Stream(time.perf_counter())
        self.prompts.append(prompt)
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        try:
            for _ in range(3):
                await asyncio.sleep(self.delay_s)
                stream.arrivals.append(time.perf_counter())
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.now -= 1
        if self.error:
            stream.fail(time.perf_counter(), self.error, "no")
        else:
            stream.close(time.perf_counter(), output_tokens, output_tokens)
        return stream


def shape(mix: Mix | None = None) -> Shape:
    return Shape(mix or Mix(), 8, 4)


def prompts(mix: Mix | None = None) -> Prompts:
    return Prompts(shape(mix), 8000, "s")


@pytest.mark.parametrize("streams", [1, 8, 64])
async def test_a_closed_load_keeps_its_streams_running(streams: int) -> None:
    target, told = FakeTarget(), []
    load = Load(streams=streams)
    done = await drive(target, load, shape(), prompts(), "s", told.append)
    assert len(done.streams) == len(target.prompts) == load.requests
    assert target.most_at_once == streams
    assert len({tuple(prompt) for prompt in target.prompts}) == load.requests
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert done.seconds == pytest.approx(
        max(one.ended for one in done.streams) - min(one.sent for one in done.streams), abs=0.05
    )


async def test_a_closed_load_with_a_duration_begins_nothing_after_it() -> None:
    target = FakeTarget()
    target.delay_s = 0.005
    done = await drive(target, Load(streams=3, seconds=0.2), shape(), prompts(), "s")
    start = min(one.sent for one in done.streams)
    assert len(done.streams) >= 6
    assert all(one.sent - start < 0.25 for one in done.streams)
    assert all(not one.failed for one in done.streams)


async def test_refusals_do_not_become_a_flood() -> None:
    target = FakeTarget()
    target.error = "HTTP 429"
    done = await drive(target, Load(streams=2, seconds=0.35), shape(), prompts(), "s")
    assert 2 <= len(done.streams) <= 10
    assert all(one.error == "HTTP 429" for one in done.streams)


async def test_an_open_load_does_not_wait_for_answers() -> None:
    target = FakeTarget()
    target.delay_s = 0.1
    done = await drive_open(lambda: target.stream([1], 4), [0.0, 0.01, 0.02, 0.03])
    assert target.most_at_once == 4
    assert len(done.streams) == 4
    assert [one.sent for one in done.streams] == sorted(one.sent for one in done.streams)


async def test_an_open_load_is_that_of_its_seed() -> None:
    counts = []
    for seed in ("a", "a", "b", "c"):
        target = FakeTarget()
        await drive(target, Load(rate=400, seconds=0.1), shape(), prompts(), seed)
        counts.append(len(target.prompts))
    assert counts[0] == counts[1]
    assert len(set(counts)) > 1


async def test_an_open_load_in_which_nothing_arrives_is_empty() -> None:
    done = await drive(FakeTarget(), Load(rate=0.001, seconds=0.01), shape(), prompts(), "s")
    assert done.streams == []


async def test_long_prompts_come_one_after_the_other_beside_running_streams() -> None:
    target = FakeTarget()
    target.delay_s = 0.002
    mix = Mix("long-prompt", 300)
    done = await drive(target, Load(streams=4), shape(mix), prompts(mix), "s")
    assert len(done.long) == LONG_PROMPTS
    assert len(done.calm) == Load(streams=4).requests
    assert sum(len(prompt) == 300 for prompt in target.prompts) == LONG_PROMPTS
    assert {one.output_tokens for one in done.long} == {1}
    assert target.most_at_once == 5
    assert done.streams
    for before, after in zip(done.long, done.long[1:], strict=False):
        assert before.ended <= after.sent


async def test_cancelling_ends_every_stream() -> None:
    target = FakeTarget()
    target.delay_s = 60
    task = asyncio.create_task(drive(target, Load(streams=5), shape(), prompts(), "s"))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (target.cancelled, target.now) == (5, 0)


async def test_warm_up() -> None:
    target = FakeTarget()
    assert len(await warm_up(target, prompts(), 4)) == WARM_UP_REQUESTS
