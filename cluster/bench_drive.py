"""Puts one load on one server and hands back every stream."""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.bench_load import LONG_PROMPTS, WARM_UP_REQUESTS, Load, Prompts, Shape, arrivals
from cluster.bench_stream import Stream
from cluster.bench_target import Target

# A closed load that is refused would else become a flood of refusals.
PAUSE_AFTER_FAILURE_S = 0.1

Tell = Callable[[float], None]
"""Is told which share of a load is done, 0 to 1."""
Send = Callable[[], Coroutine[Any, Any, Stream]]
"""Sends the next request and reads its answer."""


@dataclass
class Drive:
    """What one load did."""

    seconds: float
    """From the first request to the end of the last stream."""
    streams: list[Stream]
    long: list[Stream] = field(default_factory=list)
    """Long prompts of that mix, of which each has one token of output; `streams` are those that ran beside them."""
    calm: list[Stream] = field(default_factory=list)
    """The same load just before, when no long prompts came."""


def tell_nobody(_share: float) -> None:
    """For who does not want to know."""


async def warm_up(target: Target, prompts: Prompts, output_tokens: int) -> list[Stream]:
    """A few requests at once, so that what a server does only once it has done."""
    requests = [target.stream(prompts.next(), output_tokens) for _ in range(WARM_UP_REQUESTS)]
    return list(await asyncio.gather(*requests))


async def drive(
    target: Target, load: Load, shape: Shape, prompts: Prompts, seed: str, tell: Tell = tell_nobody
) -> Drive:
    """Runs a load to the end of its last stream. Cancelling it cancels every stream.

    Args:
        seed: of an open load's arrival times.
    """

    def send() -> Coroutine[Any, Any, Stream]:
        return target.stream(prompts.next(), shape.output_tokens)

    if load.streams is None:
        assert load.rate is not None
        assert load.seconds is not None
        return await drive_open(send, list(arrivals(load.rate, load.seconds, random.Random(seed))), tell)
    if shape.mix.kind != "long-prompt":
        return await drive_closed(send, load, tell)
    calm = await drive_closed(send, load, lambda share: tell(share / 2))
    disturbed = await _drive_beside_long(target, load, send, prompts, lambda share: tell((1 + share) / 2))
    disturbed.calm = calm.streams
    return disturbed


async def drive_closed(send: Send, load: Load, tell: Tell = tell_nobody) -> Drive:
    """`load.streams` at once, each followed by the next, until the load's requests or seconds are over."""
    began = ended = 0
    start = time.perf_counter()

    def may_begin() -> bool:
        nonlocal began
        began += 1
        if load.seconds is not None:
            return time.perf_counter() - start < load.seconds
        return began <= load.requests

    def tell_share() -> None:
        nonlocal ended
        ended += 1
        passed = time.perf_counter() - start
        tell(min(1.0, passed / load.seconds) if load.seconds is not None else ended / load.requests)

    assert load.streams is not None
    return await _follow(send, load.streams, may_begin, tell_share)


async def drive_open(send: Send, times: Sequence[float], tell: Tell = tell_nobody) -> Drive:
    """A request at each of `times`, seconds from now, whatever became of those before."""
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for number, at in enumerate(times, 1):
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            tasks.append(group.create_task(send()))
            tell(number / len(times))
    streams = [task.result() for task in tasks]
    for stream, at in zip(streams, times, strict=True):
        # A client that is late to send must not make the server look quicker.
        stream.sent = start + at
    return Drive(time.perf_counter() - start, streams)


async def _drive_beside_long(target: Target, load: Load, send: Send, prompts: Prompts, tell: Tell) -> Drive:
    """The load's streams, each followed by the next for as long as long prompts come, one after the other."""
    long: list[Stream] = []
    start = time.perf_counter()
    is_over = False

    async def send_long() -> None:
        nonlocal is_over
        while not is_over:
            long.append(await target.stream(prompts.next_long(), 1))
            passed = time.perf_counter() - start
            share = passed / load.seconds if load.seconds is not None else len(long) / LONG_PROMPTS
            is_over = share >= 1
            tell(min(1.0, share))

    assert load.streams is not None
    async with asyncio.TaskGroup() as group:
        group.create_task(send_long())
        streams = group.create_task(_follow(send, load.streams, lambda: not is_over, lambda: None))
    result = streams.result()
    result.long = long
    return result


async def _follow(send: Send, streams: int, may_begin: Callable[[], bool], ended: Callable[[], None]) -> Drive:
    collected: list[Stream] = []

    async def follow() -> None:
        while may_begin():
            stream = await send()
            collected.append(stream)
            ended()
            if stream.failed:
                await asyncio.sleep(PAUSE_AFTER_FAILURE_S)

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(follow())
    # The pause after a failure is not the server's time.
    return Drive(max((stream.ended for stream in collected), default=start) - start, collected)
