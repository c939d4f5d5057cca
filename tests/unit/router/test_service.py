"""The whole router behind a plain gRPC server, against a fake gang."""

import asyncio
import dataclasses

import grpc
import pytest
from grpc import aio

from protos import gang_pb2, gang_pb2_grpc, inference_pb2, inference_pb2_grpc
from router.policy import Candidate, pick
from tests.unit.router.conftest import until
from tests.unit.router.tiny_checkpoint import EOT

STOP, LENGTH, ERROR = (inference_pb2.FinishReason.Value(f"FINISH_REASON_{n}") for n in ("STOP", "LENGTH", "ERROR"))
TEXT = "The whale 👩‍👩‍👧‍👦 und Öl, e\u0301, 世界"


def ids_of(tokenizer, text: str) -> inference_pb2.TokenIds:
    return inference_pb2.TokenIds(ids=tokenizer.encode(text)[1:])


def metric(house, name: str, **labels) -> float:
    return house.registry.get_sample_value(name, labels) or 0


async def drain(stream) -> tuple[list[inference_pb2.GenerateResponse], aio.AioRpcError | None]:
    """What is left of a stream, and how it failed if it did."""
    responses = []
    try:
        async for response in stream:
            responses.append(response)
    except aio.AioRpcError as error:
        return responses, error
    return responses, None


async def test_text_streams_and_the_last_message_says_how_it_ended(house, tokenizer):
    prompt = ids_of(tokenizer, TEXT)
    n = len(prompt.ids)
    responses = await house.generate(token_ids=prompt, max_tokens=n, seed=11, request_id="mine", logprobs=0)
    assert "".join(r.text for r in responses) == TEXT
    assert [i for r in responses for i in r.token_ids] == list(prompt.ids)
    assert all(len(r.logprobs) == len(r.token_ids) for r in responses)
    assert len(responses) > 5
    assert (responses[0].request_id, responses[0].seed) == ("mine", 11)
    assert not any(r.request_id or r.seed for r in responses[1:])
    assert not any(r.finish_reason or r.HasField("usage") for r in responses[:-1])
    assert (responses[-1].finish_reason, responses[-1].detail) == (LENGTH, "")
    assert (responses[-1].usage.prompt_tokens, responses[-1].usage.completion_tokens) == (n, n)
    submit = house.ranks[0].submits[0]
    assert (submit.epoch, submit.max_tokens, list(submit.stop_token_ids)) == (1, n, [1, 2])
    assert (submit.sampling.temperature, submit.sampling.seed) == (0.6, 11)
    hello = house.ranks[0].hellos[0]
    assert hello.router_id.startswith("router-") and (hello.gang_id, hello.epoch) == ("gang-0", 1)


async def test_cached_tokens_are_told(house):
    house.ranks[0].cached_tokens = 2
    responses = await house.generate(text="the sea", max_tokens=5)
    assert responses[-1].usage.cached_tokens == 2


async def test_a_text_prompt_gets_begin_of_text_once(house, tokenizer):
    await house.generate(text="the sea", max_tokens=1)
    assert list(house.ranks[0].submits[0].prompt_ids) == tokenizer.encode("the sea")


@pytest.mark.parametrize("per_step", [1, 40])
async def test_prompt_logprobs_come_with_the_first_message(build, config, tokenizer, per_step):
    house = await build(config=dataclasses.replace(config, max_tokens_per_message=16))
    house.ranks[0].per_step = per_step
    prompt = ids_of(tokenizer, "the sea")
    responses = await house.generate(token_ids=prompt, max_tokens=40, prompt_logprobs=2, ignore_eos=True)
    assert [p.chosen.token_id for p in responses[0].prompt_logprobs] == list(prompt.ids[1:])
    assert not any(r.prompt_logprobs for r in responses[1:])
    assert sum(len(r.token_ids) for r in responses) == 40
    assert not any(r.logprobs for r in responses)


async def test_a_drawn_seed_is_returned(house):
    responses = await house.generate(text="the sea", max_tokens=2)
    assert responses[0].seed == house.ranks[0].submits[0].sampling.seed != 0
    assert len(responses[0].request_id) == 32


async def test_a_stop_token_is_sent_but_is_no_text(house, tokenizer):
    sea = ids_of(tokenizer, "the sea").ids
    tool = tokenizer.encode("<tool>")[1]
    for stop, fields in ((EOT, {}), (tool, {"stop_token_ids": [tool]})):
        prompt = inference_pb2.TokenIds(ids=[*sea, stop])
        responses = await house.generate(token_ids=prompt, max_tokens=50, **fields)
        assert "".join(r.text for r in responses) == "the sea"
        assert [i for r in responses for i in r.token_ids] == list(prompt.ids)
        assert responses[-1].finish_reason == STOP
        assert responses[-1].usage.completion_tokens == len(prompt.ids)


@pytest.mark.parametrize("per_step", [1, 100])
async def test_a_stop_string_ends_the_work_and_is_not_seen(house, tokenizer, per_step):
    house.ranks[0].per_step = per_step
    house.ranks[0].step_s = 0.002
    prompt = ids_of(tokenizer, "call me what you will")
    responses = await house.generate(token_ids=prompt, max_tokens=150, stop=["whale", "what you"], logprobs=1)
    assert "".join(r.text for r in responses) == "call me "
    assert responses[-1].finish_reason == STOP
    ids = [i for r in responses for i in r.token_ids]
    assert tokenizer.decode(ids[:-1]).count("what you") == 0 and "what you" in tokenizer.decode(ids)
    assert responses[-1].usage.completion_tokens == len(ids) == sum(len(r.logprobs) for r in responses)
    if per_step == 1:
        await until(lambda: house.ranks[0].aborts == [house.ranks[0].submits[0].sequence_id])


async def test_text_held_back_comes_at_the_end(house, tokenizer):
    prompt = ids_of(tokenizer, "the sea")
    responses = await house.generate(token_ids=prompt, max_tokens=len(prompt.ids), stop=["sea shore"])
    assert "".join(r.text for r in responses) == "the sea"
    assert responses[-1].finish_reason == LENGTH


async def test_half_a_character_at_the_end_is_replaced(house, tokenizer):
    prompt = inference_pb2.TokenIds(ids=ids_of(tokenizer, "☃").ids[:2])
    responses = await house.generate(token_ids=prompt, max_tokens=2)
    assert [r.text for r in responses] == ["", "\ufffd"]


async def test_a_cancel_aborts_at_once(house):
    house.ranks[0].step_s = 0.01
    call = house.inference.Generate(inference_pb2.GenerateRequest(text="the sea", max_tokens=200, ignore_eos=True))
    await call.read()
    call.cancel()
    await until(lambda: house.ranks[0].aborts == [house.ranks[0].submits[0].sequence_id], seconds=1)
    await until(lambda: metric(house, "caravan_streams_running") == 0)
    assert metric(house, "caravan_requests_total", finish_reason="abort", status="CANCELLED") == 1


async def test_a_cancel_before_the_first_token_aborts(house):
    house.ranks[0].running.clear()
    call = house.inference.Generate(inference_pb2.GenerateRequest(text="the sea", max_tokens=200))
    asyncio.get_running_loop().call_later(0.1, call.cancel)
    with pytest.raises(asyncio.CancelledError):
        await call.read()
    await until(lambda: house.ranks[0].aborts)


async def test_a_deadline_aborts(house):
    house.ranks[0].running.clear()
    call = house.inference.Generate(inference_pb2.GenerateRequest(text="the sea"), timeout=0.1)
    # The router's own clock may be the first to tell: then a last message says so, too.
    responses, error = await drain(call)
    assert error is not None and error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert [r.finish_reason for r in responses] in ([], [inference_pb2.FINISH_REASON_DEADLINE])
    await until(lambda: house.ranks[0].aborts)


async def test_bad_input_is_refused_before_anything_is_sent(house):
    for fields, field in (
        ({"text": ""}, "text"),
        ({"text": "x" * (10 * 2**20)}, "text"),
        ({"text": "a", "top_p": 0.0}, "top_p"),
        ({"text": "a", "max_tokens": 1000}, "max_tokens"),
        ({"token_ids": inference_pb2.TokenIds(ids=[10**6])}, "token_ids"),
    ):
        with pytest.raises(aio.AioRpcError) as caught:
            await house.generate(**fields)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details().startswith(f"{field}: ")
    assert not house.ranks[0].submits
    assert metric(house, "caravan_requests_total", finish_reason="error", status="INVALID_ARGUMENT") == 5


async def test_the_streams_of_a_dead_rank_go_on_at_another(build):
    house = await build(num_ranks=2)
    for rank in house.ranks:
        rank.step_s = 0.02
    calls = [
        house.inference.Generate(inference_pb2.GenerateRequest(text="the sea", max_tokens=30, ignore_eos=True))
        for _ in range(4)
    ]
    streams = [aiter(call) for call in calls]
    firsts = [await anext(stream) for stream in streams]
    assert [len(rank.submits) for rank in house.ranks] == [2, 2]
    await house.ranks[1].die()
    prompt = house.ranks[0].submits[0].prompt_ids
    for stream, first in zip(streams, firsts, strict=True):
        rest, error = await drain(stream)
        assert error is None
        ids = [i for r in (first, *rest) for i in r.token_ids]
        assert ids == [prompt[i % len(prompt)] for i in range(30)]
    assert len(house.ranks[0].submits) == 4
    assert metric(house, "caravan_streams_replayed_total", reason="connection") == 2
    assert metric(house, "caravan_replay_gap_seconds_count") == 2
    # New requests go where they can.
    await until(lambda: len([link for link in house.links if link.is_connected]) == 1)
    house.ranks[0].step_s = 0
    assert (await house.generate(text="the sea", max_tokens=3))[-1].finish_reason == LENGTH


async def test_the_last_message_before_unavailable_says_error(build, config):
    house = await build(config=dataclasses.replace(config, replay_wait_s=0.2))
    house.ranks[0].step_s = 0.02
    call = house.inference.Generate(inference_pb2.GenerateRequest(text="the sea", max_tokens=100, ignore_eos=True))
    stream = aiter(call)
    responses = [await anext(stream)]
    await house.ranks[0].die()
    rest, error = await drain(stream)
    responses += rest
    assert error is not None and error.details() == responses[-1].detail
    assert error.details().startswith("rank 0 of gang-0 was lost (")
    assert "within 0.2 s no other rank could go on with the stream (no rank of gang-0 can be rea" in error.details()
    assert responses[-1].finish_reason == ERROR
    assert responses[-1].usage.completion_tokens == sum(len(r.token_ids) for r in responses)
    assert metric(house, "caravan_requests_total", finish_reason="error", status="UNAVAILABLE") == 1


async def test_a_view_that_calls_a_rank_dead_ends_its_streams(build, config):
    house = await build(config=dataclasses.replace(config, max_replays=0))
    house.ranks[0].running.clear()
    task = asyncio.create_task(house.generate(text="the sea"))
    await until(lambda: house.ranks[0].submits)
    house.leader.view.ranks[0].state = "dead"
    house.leader.tell()
    with pytest.raises(aio.AioRpcError) as caught:
        await task
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "rank 0 of gang-0 died" in caught.value.details()


async def test_a_rank_that_refuses_ends_the_stream(house):
    house.ranks[0].running.clear()
    task = asyncio.create_task(house.generate(text="the sea"))
    await until(lambda: house.ranks[0].submits)
    sequence_id = house.ranks[0].submits[0].sequence_id
    refusal = gang_pb2.SequenceOutput(sequence_id=sequence_id, finish_reason=ERROR, detail="epoch 1 is over")
    house.ranks[0].send(house.ranks[0].output(refusal))
    with pytest.raises(aio.AioRpcError) as caught:
        await task
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, "epoch 1 is over")


async def test_a_lost_link_is_made_again(house):
    rank = house.ranks[0]
    port = rank.address
    await rank.die()
    await until(lambda: not house.links[0].is_connected)
    with pytest.raises(aio.AioRpcError) as caught:
        await house.generate(text="the sea")
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "no rank of gang-0 can be reached" in caught.value.details()
    server = aio.server()
    server.add_insecure_port(port)
    gang_pb2_grpc.add_RankServicer_to_server(rank, server)
    await server.start()
    rank.server = server
    await until(lambda: house.links[0].is_connected)
    assert (await house.generate(text="the sea", max_tokens=2))[-1].finish_reason == LENGTH


@pytest.mark.parametrize("stale", [{"epoch": 1}, {"incarnation": 7}])
async def test_messages_that_are_not_current_are_dropped(house, stale):
    rank = house.ranks[0]
    rank.epoch = house.leader.view.epoch = 2
    house.leader.tell()
    await until(lambda: house.links[0].epoch == 2)
    rank.running.clear()
    task = asyncio.create_task(house.generate(text="the sea", max_tokens=2))
    await until(lambda: rank.submits)
    assert rank.submits[0].epoch == 2
    ghost = gang_pb2.SequenceOutput(sequence_id=12345, token_ids=[9, 9, 9], finish_reason=LENGTH)
    rank.send(rank.output(ghost, **stale))
    await until(lambda: metric(house, "caravan_router_fenced_messages_total") == 1)
    rank.running.set()
    responses = await task
    assert sum(len(r.token_ids) for r in responses) == 2


async def test_a_hole_in_a_stream_does_not_go_unnoticed(house):
    rank = house.ranks[0]
    rank.running.clear()
    task = asyncio.create_task(house.generate(text="the sea", max_tokens=2))
    await until(lambda: rank.submits)
    rank.epoch = 2
    rank.send(rank.output())
    mine = gang_pb2.SequenceOutput(sequence_id=rank.submits[0].sequence_id, token_ids=[9])
    rank.send(rank.output(mine, epoch=1))
    await until(lambda: rank.aborts)
    rank.running.set()
    ids = [i for r in await task for i in r.token_ids]
    assert ids == list(rank.submits[0].prompt_ids[:2])
    assert len({submit.sequence_id for submit in rank.submits}) == 2
    assert metric(house, "caravan_router_fenced_messages_total") == 1
    assert metric(house, "caravan_streams_replayed_total", reason="fenced") == 1


async def test_a_slow_client_loses_nothing_and_delays_nobody(build, config):
    house = await build(config=dataclasses.replace(config, max_tokens_per_message=16))
    house.leader.view.max_model_len = 100_000
    house.leader.tell()
    await until(lambda: house.service._gangs.context_length() == 100_000)
    n = 8_000
    # Its flow-control window is soon full, and it does not read.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    channel = aio.insecure_channel(house.address, options=options)
    call = inference_pb2_grpc.InferenceStub(channel).Generate(
        inference_pb2.GenerateRequest(text="the sea " * 5, max_tokens=n, ignore_eos=True, logprobs=0), timeout=60
    )
    slow = aiter(call)
    await anext(slow)
    responses = await house.generate(text="the sea", max_tokens=100, ignore_eos=True)
    assert sum(len(r.token_ids) for r in responses) == 100
    await until(lambda: not house.links[0]._streams, seconds=20)  # The rank was never held up.
    prompt = house.ranks[0].submits[0].prompt_ids
    sizes, ids = [], []
    async for response in slow:
        sizes.append(len(response.token_ids))
        ids += response.token_ids
    assert len(ids) == n - 1
    assert ids == [prompt[i % len(prompt)] for i in range(1, n)]
    assert max(sizes) == 16
    await channel.close()


async def test_sequences_spread_over_ranks(build):
    house = await build(num_ranks=3)
    for rank in house.ranks:
        rank.running.clear()
    tasks = [asyncio.create_task(house.generate(text="the sea", max_tokens=2)) for _ in range(9)]
    await until(lambda: sum(len(rank.submits) for rank in house.ranks) == 9)
    assert [len(rank.submits) for rank in house.ranks] == [3, 3, 3]
    for rank in house.ranks:
        rank.running.set()
    await asyncio.gather(*tasks)


def test_policy():
    def rank(n: int, tokens: int, sequences: int, gang: str = "a") -> Candidate:
        return Candidate(gang, n, tokens, sequences)

    assert pick([rank(0, 10, 1), rank(1, 9, 5)]).rank == 1
    assert pick([rank(0, 9, 6), rank(1, 9, 5)]).rank == 1
    assert pick([rank(1, 9, 5), rank(0, 9, 5)]).rank == 0
    assert pick([rank(0, 9, 5, "b"), rank(1, 9, 5, "a")]).gang_id == "a"


async def test_no_gang_ready(build):
    house = await build(wait=False)
    house.leader.view.state = "starting"
    house.leader.view.detail = "rank 0 has read 3 of 4 bytes"
    house.leader.tell()
    await until(lambda: house.service._gangs.views and house.service._gangs.views[0].state == "starting")
    for call in (house.generate(text="the sea"), house.inference.GetModel(inference_pb2.GetModelRequest())):
        with pytest.raises(aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "gang-0 is starting: rank 0 has read 3 of 4 bytes" in caught.value.details()
    status = await house.admin.GetStatus(inference_pb2.GetStatusRequest())
    assert (status.gangs[0].state, status.gangs[0].detail) == ("starting", "rank 0 has read 3 of 4 bytes")


async def test_a_failed_gang_ends_its_streams(house):
    house.ranks[0].running.clear()
    task = asyncio.create_task(house.generate(text="the sea"))
    await until(lambda: house.ranks[0].submits)
    house.leader.view.state, house.leader.view.detail = "failed", "out of memory"
    house.leader.tell()
    with pytest.raises(aio.AioRpcError) as caught:
        await task
    assert caught.value.details() == "gang-0 failed: out of memory"


async def test_streams_outlive_their_leader(house):
    house.ranks[0].step_s = 0.02
    task = asyncio.create_task(house.generate(text="the sea", max_tokens=30, ignore_eos=True))
    await until(lambda: house.ranks[0].submits)
    await house.leader.stop()
    assert sum(len(r.token_ids) for r in await task) == 30
    assert (await house.generate(text="the sea", max_tokens=2))[-1].finish_reason == LENGTH
    await house.leader.start()
    house.leader.view.max_model_len = 99
    await until(lambda: house.leader.watchers)
    house.leader.tell()
    await until(lambda: house.service._gangs.context_length() == 99)


async def test_a_stream_without_tokens_does_not_wait_for_ever(build, config):
    house = await build(config=dataclasses.replace(config, stream_stall_s=0.1))
    house.ranks[0].running.clear()
    with pytest.raises(aio.AioRpcError) as caught:
        await house.generate(text="the sea")
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "sent no token in 0.1 s" in caught.value.details()
    await until(lambda: house.ranks[0].aborts)


async def test_model_status_and_tokens(house, tokenizer):
    model = await house.inference.GetModel(inference_pb2.GetModelRequest())
    assert (model.name, model.dtype, model.context_length, model.num_moe_layers) == ("tiny", "float32", 256, 2)
    status = await house.admin.GetStatus(inference_pb2.GetStatusRequest())
    gang = status.gangs[0]
    assert (status.model, gang.id, gang.epoch, gang.running, gang.waiting) == ("tiny", "gang-0", 1, 1, 2)
    rank = gang.ranks[0]
    assert (rank.incarnation, rank.pid, rank.state, rank.experts, rank.tokens_computed) == (1, 100, "ready", 4, 7)
    tokens = await house.inference.Tokenize(inference_pb2.TokenizeRequest(text=TEXT))
    assert list(tokens.token_ids) == tokenizer.encode(TEXT)
    text = await house.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=tokens.token_ids))
    assert text.text == TEXT
    for call in (
        house.inference.Tokenize(inference_pb2.TokenizeRequest(text="x" * (5 * 2**20))),
        house.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[10**6])),
    ):
        with pytest.raises(aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_metrics(house, tokenizer):
    prompt = ids_of(tokenizer, "the sea and the whale")
    await house.generate(token_ids=prompt, max_tokens=5)
    await until(lambda: metric(house, "caravan_streams_running") == 0)
    assert metric(house, "caravan_prompt_tokens_total") == len(prompt.ids)
    assert metric(house, "caravan_output_tokens_total") == 5
    assert metric(house, "caravan_time_to_first_token_seconds_count") == 1
    assert metric(house, "caravan_inter_token_seconds_count") == 4
    assert metric(house, "caravan_request_seconds_count") == 1
    assert metric(house, "caravan_requests_total", finish_reason="length", status="OK") == 1


async def test_a_defect_is_reported_as_one(house, monkeypatch):
    def broken(*_: object) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(house.service._validator, "check", broken)
    with pytest.raises(aio.AioRpcError) as caught:
        await house.generate(text="the sea")
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()


async def test_two_hundred_at_once_a_third_cancelled(build, tokenizer):
    house = await build(num_ranks=2)
    for rank in house.ranks:
        rank.step_s = 0.001

    async def one(n: int) -> int:
        call = house.inference.Generate(
            inference_pb2.GenerateRequest(token_ids=ids_of(tokenizer, TEXT), max_tokens=10 + n % 40), timeout=30
        )
        if n % 3 == 0:
            asyncio.get_running_loop().call_later(0.002 * (n % 17), call.cancel)
        try:
            return sum([len(r.token_ids) async for r in call]) - (10 + n % 40)
        except asyncio.CancelledError:
            return 0

    assert set(await asyncio.gather(*(one(n) for n in range(200)))) == {0}
    await until(lambda: not any(link._streams or link._submitted for link in house.links))
    assert metric(house, "caravan_streams_running") == 0
