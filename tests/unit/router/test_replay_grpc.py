"""Streams whose rank is lost, over gRPC."""

import asyncio
import dataclasses

import pytest
from grpc import aio

from protos import gang_pb2_grpc, inference_pb2
from protos.errors import CaravanError
from router.call import CallInfo
from tests.unit.router.conftest import until
from tests.unit.router.replay_scenes import LONG
from tests.unit.router.test_resume import collect
from tests.unit.router.test_service import metric


async def test_a_whole_gang_starts_over_under_a_stream(build, tokenizer):
    house = await build(num_ranks=2)
    for rank in house.ranks:
        rank.step_s = 0.01
    text = "the sea and the whale and the long way home " * 2
    fields = {"text": text, "max_tokens": 60, "logprobs": 0, "prompt_logprobs": 0, "stop": ["home the sea"]}
    whole = await collect(house.service, inference_pb2.GenerateRequest(**fields, ignore_eos=True))
    task = asyncio.create_task(collect(house.service, inference_pb2.GenerateRequest(**fields, ignore_eos=True)))
    await until(lambda: sum(len(rank.submits) for rank in house.ranks) == 2)
    await asyncio.sleep(0.15)
    view = house.leader.view
    for rank in house.ranks:
        await rank.die()
    view.state, view.detail = "starting", "starting over"
    for member in view.ranks:
        member.state = "dead"
    house.leader.tell()
    await until(lambda: not house.service.is_ready)
    view.state, view.epoch = "ready", 2
    for rank, member in zip(house.ranks, view.ranks, strict=True):
        rank.epoch = rank.incarnation = 2
        await rank.start()
        member.incarnation, member.state, member.address = 2, "ready", rank.address
    house.leader.tell()
    done = await task
    assert (done.token_ids, done.text, done.logprobs, done.prompt_logprobs, done.finish_reason, done.usage) == (
        whole.token_ids, whole.text, whole.logprobs, whole.prompt_logprobs, whole.finish_reason, whole.usage
    )  # fmt: skip
    assert [list(rank.hellos)[-1].incarnation for rank in house.ranks] == [2, 2]
    assert metric(house, "caravan_replay_gap_seconds_count") == 1


async def test_a_resumable_stream_is_replayed_without_a_connection(build):
    house = await build(num_ranks=2)
    for rank in house.ranks:
        rank.step_s = 0.01
    fields = {"text": "the sea", "max_tokens": 40, "ignore_eos": True, "resumable": True, "request_id": "r"}
    gone = house.service.generate(inference_pb2.GenerateRequest(**fields))
    seed = (await anext(gone)).seed
    await gone.aclose()
    await next(rank for rank in house.ranks if rank.submits).die()
    rest = await collect(house.service, inference_pb2.GenerateRequest(**fields, resume_offset=1, seed=seed), CallInfo())
    assert len(rest.token_ids) == 39 and rest.usage.completion_tokens == 40
    assert sum(len(rank.submits) for rank in house.ranks) == 2


async def test_health_says_so_while_streams_wait(build, config):
    house = await build(config=dataclasses.replace(config, replay_wait_s=0.3))
    house.ranks[0].step_s = 0.01
    task = asyncio.create_task(collect(house.service, inference_pb2.GenerateRequest(**LONG)))
    await until(lambda: house.ranks[0].submits)
    await house.ranks[0].die()
    await until(lambda: not house.service.is_ready)
    assert not task.done()
    with pytest.raises(CaravanError, match="no other rank could go on"):
        await task


async def test_a_rank_that_accepts_nobody_gets_nothing(build, config):
    house = await build(config=dataclasses.replace(config, max_replays=0))
    (rank,) = house.ranks
    rank.refuses = True
    rank.outboxes.clear()
    await rank.server.stop(0)  # The link breaks; behind the same address somebody says no.
    address = rank.address
    server = aio.server()
    server.add_insecure_port(address)
    gang_pb2_grpc.add_RankServicer_to_server(rank, server)
    await server.start()
    rank.server = server
    await until(lambda: not house.links[0].is_connected)
    for _ in range(30):
        await asyncio.sleep(0.01)
        assert not house.links[0].is_connected
    rank.refuses = False
    await until(lambda: house.links[0].is_connected)
    assert (await house.generate(text="the sea", max_tokens=2))[-1].finish_reason
