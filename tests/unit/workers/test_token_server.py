"""The rank's end of the token plane over real gRPC: what comes in, what is refused, one message a step and router."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from protos import gang_pb2, gang_pb2_grpc, inference_pb2
from workers.inbox import Abort, Add, Inbox, Message, RouterGone
from workers.scheduler import Emitted, Finish
from workers.sequence import Logprobs, Sample, SamplingParams, Sequence
from workers.token_server import TokenServer

HEADER = gang_pb2.StepOutput(gang_id="gang", epoch=3, rank=2, incarnation=7)
SAMPLING = gang_pb2.Sampling(temperature=0.0, top_p=1.0, repetition_penalty=1.0)
LOAD = gang_pb2.RankLoad(running=2, kv_usage_ratio=0.5)


@dataclass
class Served:
    address: str
    server: TokenServer
    inbox: Inbox

    async def messages(self, count: int) -> list[Message]:
        """The next `count` messages of the inbox."""
        got: list[Message] = []
        async with asyncio.timeout(10):
            while len(got) < count:
                got += self.inbox.drain()
                await asyncio.sleep(0.005)
        return got


class Router:
    """A client of Rank.Connect. `queue` is what it still has to say."""

    def __init__(self, channel: grpc.aio.Channel, name: str | None, gang: str = "gang") -> None:
        self.queue: asyncio.Queue[gang_pb2.RouterMessage | None] = asyncio.Queue()
        if name is not None:
            self.say(hello=gang_pb2.Hello(router_id=name, gang_id=gang, epoch=3))
        self.call = gang_pb2_grpc.RankStub(channel).Connect(self._outgoing())

    def say(self, **message: Any) -> None:
        self.queue.put_nowait(gang_pb2.RouterMessage(**message))

    def submit(self, sequence_id: int, **changes: Any) -> None:
        fields = {"epoch": 3, "prompt_ids": [5, 6], "sampling": SAMPLING, "max_tokens": 4, **changes}
        self.say(submit=gang_pb2.Submit(sequence_id=sequence_id, **fields))

    async def read(self) -> gang_pb2.StepOutput:
        async with asyncio.timeout(10):
            message = await self.call.read()
        assert isinstance(message, gang_pb2.StepOutput), "the stream ended"
        return message

    async def error(self) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await self.read()
        return raised.value.code(), raised.value.details()

    async def _outgoing(self) -> AsyncIterator[gang_pb2.RouterMessage]:
        while (message := await self.queue.get()) is not None:
            yield message


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    inbox = Inbox()
    inbox.enter(3)
    token_server = TokenServer(HEADER, inbox, vocab_size=100, max_model_len=20)
    server = grpc.aio.server()
    gang_pb2_grpc.add_RankServicer_to_server(token_server, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield Served(f"127.0.0.1:{port}", token_server, inbox)
    await server.stop(0)


@pytest.fixture
async def channel(served: Served) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(served.address) as channel:
        yield channel


def emitted(router: str, number: int, token: int, cached: int = 0, **more: Any) -> Emitted:
    sequence = Sequence((router, number), [1] * 8, SamplingParams(), 9, num_cached_tokens=cached)
    return Emitted(
        sequence,
        Sample(token, more.get("logprobs")),
        more.get("finish"),
        more.get("prompt_logprobs", []),
        more.get("is_first", False),
    )


async def test_the_first_token_tells_what_was_cached(served: Served, channel: grpc.aio.Channel) -> None:
    router = Router(channel, "r1")
    router.submit(1)
    await served.messages(1)
    outputs = [
        emitted("r1", 1, 42, cached=4, is_first=True),
        emitted("r1", 2, 42, cached=4),
        # Of a replayed stream, what it had put out is no part of the prompt.
        emitted("r1", 3, 42, cached=32, is_first=True),
    ]
    served.server.publish(1, outputs, LOAD)
    message = await router.read()
    assert [output.cached_tokens for output in message.outputs] == [4, 0, 8]


async def test_a_submission_arrives_whole(served: Served, channel: grpc.aio.Channel) -> None:
    router = Router(channel, "r1")
    router.submit(
        11,
        prompt_ids=[1, 2, 99],
        output_ids=[7],
        sampling=gang_pb2.Sampling(
            temperature=0.5,
            top_p=0.9,
            top_k=4,
            min_p=0.1,
            repetition_penalty=1.5,
            presence_penalty=-1.0,
            frequency_penalty=0.25,
            seed=2**64 - 1,
            logprobs=0,
        ),
        max_tokens=17,
        min_tokens=2,
        stop_token_ids=[3, 4, 3],
        sibling=6,
    )
    router.submit(12)
    router.say(abort=gang_pb2.Abort(sequence_id=11))
    add, second, abort = await served.messages(3)
    assert isinstance(add, Add)
    assert isinstance(second, Add)
    sequence = add.sequence
    assert (sequence.key, sequence.prompt_ids, sequence.output_ids) == (("r1", 11), [1, 2, 99], [7])
    assert (sequence.max_tokens, sequence.min_tokens, sequence.stop_token_ids) == (17, 2, frozenset({3, 4}))
    assert sequence.num_computed_tokens == 0
    assert sequence.sampling == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=0.25,
        seed=2**64 - 1,
        sibling=6,
        logprobs=0,
    )
    assert second.sequence.sampling == SamplingParams()
    assert second.sequence.sampling.logprobs is None
    assert abort == Abort(("r1", 11))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epoch": 2}, "submitted to epoch 2, but the gang is in epoch 3"),
        ({"epoch": 4}, "submitted to epoch 4, but the gang is in epoch 3"),
        ({"prompt_ids": []}, "the prompt is empty"),
        ({"prompt_ids": [1, 100]}, "a prompt id is outside the vocabulary of 100"),
        ({"output_ids": [100]}, "outside the vocabulary of 100"),
        ({"output_ids": [1, 2, 3, 4]}, "4 output tokens are there already"),
        ({"prompt_ids": [1] * 17}, "prompt (17 tokens) and max_tokens (4) do not fit the context of 20"),
        ({"max_tokens": 0}, "max_tokens (0)"),
    ],
)
async def test_refusals(served: Served, channel: grpc.aio.Channel, changes: dict[str, Any], sentence: str) -> None:
    router = Router(channel, "r1")
    router.submit(5, **changes)
    message = await router.read()
    assert (message.gang_id, message.epoch, message.rank, message.incarnation) == ("gang", 3, 2, 7)
    (output,) = message.outputs
    assert output.sequence_id == 5
    assert output.finish_reason == inference_pb2.FINISH_REASON_ERROR
    assert sentence in output.detail
    assert not output.token_ids
    # What is wrong with a request is wrong everywhere; another epoch is nothing that is wrong with it.
    assert output.resubmit == ("epoch" in changes)
    # The stream lives on, and nothing of the refused one reached the engine.
    router.submit(6)
    (add,) = await served.messages(1)
    assert isinstance(add, Add)
    assert add.sequence.key == ("r1", 6)


async def test_the_longest_that_fits_is_taken(served: Served, channel: grpc.aio.Channel) -> None:
    router = Router(channel, "r1")
    router.submit(1, prompt_ids=[99] * 16, max_tokens=4, output_ids=[1, 2, 3])
    (add,) = await served.messages(1)
    assert isinstance(add, Add)


async def test_one_message_a_step_for_each_router(served: Served, channel: grpc.aio.Channel) -> None:
    routers = {name: Router(channel, name) for name in ("r1", "r2", "r3")}
    for router in routers.values():
        router.submit(1)
    await served.messages(3)
    logprobs = Logprobs((42, -0.5), [(42, -0.5), (7, -1.5)])
    served.server.publish(
        9,
        [
            emitted("r1", 1, 42, logprobs=logprobs),
            emitted("r2", 1, 43, finish=Finish.STOP),
            emitted("r1", 2, 44, finish=Finish.LENGTH),
            emitted("gone", 1, 45),
        ],
        LOAD,
    )
    served.server.publish(10, [emitted("r2", 2, 46)], LOAD)

    first = await routers["r1"].read()
    assert (first.gang_id, first.epoch, first.rank, first.incarnation, first.step) == ("gang", 3, 2, 7, 9)
    assert first.load == LOAD
    assert [(output.sequence_id, list(output.token_ids)) for output in first.outputs] == [(1, [42]), (2, [44])]
    assert [output.finish_reason for output in first.outputs] == [
        inference_pb2.FINISH_REASON_UNSPECIFIED,
        inference_pb2.FINISH_REASON_LENGTH,
    ]
    (position,) = first.outputs[0].logprobs
    assert (position.chosen.token_id, position.chosen.logprob) == (42, -0.5)
    assert [(top.token_id, top.logprob) for top in position.top] == [(42, -0.5), (7, -1.5)]
    assert not first.outputs[1].logprobs

    second = [await routers["r2"].read(), await routers["r2"].read()]
    assert [message.step for message in second] == [9, 10]
    assert second[0].outputs[0].finish_reason == inference_pb2.FINISH_REASON_STOP
    assert [list(message.outputs[0].token_ids) for message in second] == [[43], [46]]

    # The third had nothing in either step and hears of the next alone.
    served.server.publish(11, [emitted("r3", 1, 47)], LOAD)
    assert (await routers["r3"].read()).step == 11


async def test_a_router_that_goes_is_reported(served: Served, channel: grpc.aio.Channel) -> None:
    router = Router(channel, "r1")
    router.submit(1)
    await served.messages(1)
    router.call.cancel()
    assert await served.messages(1) == [RouterGone("r1")]
    # What was still under way for it is nobody's, and its name is free again.
    served.server.publish(1, [emitted("r1", 1, 42)], LOAD)
    again = Router(channel, "r1")
    again.submit(2)
    (add,) = await served.messages(1)
    assert isinstance(add, Add)


async def test_a_router_whose_connection_breaks_is_reported(served: Served) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        Router(channel, "r1").submit(1)
        await served.messages(1)
    assert await served.messages(1) == [RouterGone("r1")]


async def test_a_router_that_has_no_more_to_say_still_hears(served: Served, channel: grpc.aio.Channel) -> None:
    router = Router(channel, "r1")
    router.submit(1)
    router.queue.put_nowait(None)
    await served.messages(1)
    served.server.publish(1, [emitted("r1", 1, 42)], LOAD)
    assert (await router.read()).outputs[0].token_ids == [42]


async def test_hello_comes_first(served: Served, channel: grpc.aio.Channel) -> None:
    router = Router(channel, None)
    router.submit(1)
    assert await router.error() == (grpc.StatusCode.INVALID_ARGUMENT, "the first message must be Hello")
    silent = Router(channel, None)
    silent.queue.put_nowait(None)
    assert (await silent.error())[0] == grpc.StatusCode.INVALID_ARGUMENT
    assert served.inbox.drain() == []


async def test_another_gangs_router_is_refused(served: Served, channel: grpc.aio.Channel) -> None:
    code, details = await Router(channel, "r1", gang="other").error()
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "this is gang gang (asked: other)" in details
    assert served.inbox.drain() == []


async def test_a_router_that_means_another_incarnation_is_refused(served: Served, channel: grpc.aio.Channel) -> None:
    router = Router(channel, None)
    router.say(hello=gang_pb2.Hello(router_id="r1", gang_id="gang", epoch=3, incarnation=6))
    code, details = await router.error()
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "this is incarnation 7 (asked: 6)" in details
    # The router's epoch may be an old one.
    router = Router(channel, None)
    router.say(hello=gang_pb2.Hello(router_id="r1", gang_id="gang", epoch=1, incarnation=7))
    async with asyncio.timeout(10):
        await router.call.initial_metadata()
    assert not router.call.done(), "it is told at once that it is accepted"


async def test_two_routers_of_one_name_are_refused(served: Served, channel: grpc.aio.Channel) -> None:
    first = Router(channel, "r1")
    first.submit(1)
    await served.messages(1)
    code, details = await Router(channel, "r1").error()
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "r1 is connected" in details
    # The first one is left alone.
    served.server.publish(1, [emitted("r1", 1, 42)], LOAD)
    assert (await first.read()).step == 1
    assert served.inbox.drain() == []


async def test_a_second_hello_is_ignored(served: Served, channel: grpc.aio.Channel) -> None:
    router = Router(channel, "r1")
    router.say(hello=gang_pb2.Hello(router_id="r2", gang_id="gang", epoch=3))
    router.submit(1)
    (add,) = await served.messages(1)
    assert isinstance(add, Add)
    assert add.sequence.key == ("r1", 1)


@pytest.mark.parametrize(
    ("gang", "epoch", "step", "wakes"),
    [("gang", 3, 5, True), ("gang", 3, 4, False), ("gang", 2, 5, False), ("gang", 4, 5, False), ("other", 3, 5, False)],
)
async def test_wake(served: Served, channel: grpc.aio.Channel, gang: str, epoch: int, step: int, wakes: bool) -> None:
    parked = asyncio.create_task(asyncio.to_thread(served.inbox.park, 5))
    request = gang_pb2.WakeRequest(gang_id=gang, epoch=epoch, step=step)
    await gang_pb2_grpc.RankStub(channel).Wake(request, timeout=10)
    done, _ = await asyncio.wait([parked], timeout=5 if wakes else 0.1)
    assert bool(done) is wakes
    served.inbox.stop()
    assert await asyncio.wait_for(parked, 5) is False


async def test_another_epoch_keeps_streams_and_refuses_what_is_for_the_one_before(
    served: Served, channel: grpc.aio.Channel
) -> None:
    router = Router(channel, "r1")
    router.submit(1)
    await served.messages(1)
    await served.server.enter(4)
    router.submit(2)
    refused = await router.read()
    assert refused.epoch == 4
    assert refused.outputs[0].resubmit
    assert refused.outputs[0].detail == "submitted to epoch 3, but the gang is in epoch 4"
    served.server.publish(1, [emitted("r1", 1, 42)], LOAD)
    message = await router.read()
    assert (message.epoch, message.step, message.outputs[0].token_ids) == (4, 1, [42])
    assert served.inbox.drain() == []
