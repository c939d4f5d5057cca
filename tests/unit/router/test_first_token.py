"""Who has no token yet is served first of a step's outputs."""

import asyncio
import dataclasses

from protos import gang_pb2, inference_pb2
from router.stream import Stream
from tests.unit.router.conftest import until
from tests.unit.router.front import open_front


async def test_a_first_token_goes_before_the_others_next_ones(config, monkeypatch) -> None:
    delivered: list[int] = []
    deliver = Stream.deliver

    def note(self: Stream, output: gang_pb2.SequenceOutput) -> None:
        delivered.append(output.sequence_id)
        deliver(self, output)

    monkeypatch.setattr(Stream, "deliver", note)
    async with open_front(dataclasses.replace(config, host="127.0.0.1")) as front:
        rank = front.ranks[0]
        rank.running.clear()
        request = inference_pb2.GenerateRequest(text="the sea", max_tokens=5)
        calls = [front.inference.GenerateOnce(request) for _ in range(2)]
        waiting = [asyncio.ensure_future(_wait(call)) for call in calls]
        await until(lambda: len(rank.submits) == 2)
        rank.send(rank.output(*(_token(submit.sequence_id) for submit in rank.submits)))
        await until(lambda: len(delivered) == 2)
        waiting.append(asyncio.ensure_future(_wait(front.inference.GenerateOnce(request))))
        await until(lambda: len(rank.submits) == 3)
        first, second, new = (submit.sequence_id for submit in rank.submits)
        rank.send(rank.output(_token(first), _token(second), _token(new)))
        await until(lambda: len(delivered) == 5)
        assert delivered[2:] == [new, first, second]
        rank.running.set()
        await asyncio.gather(*waiting)


def _token(sequence_id: int) -> gang_pb2.SequenceOutput:
    return gang_pb2.SequenceOutput(sequence_id=sequence_id, token_ids=[5])


async def _wait(call) -> None:
    await call
