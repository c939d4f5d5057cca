"""Deadlines, the queue before the ranks, and refusals, through the whole router."""

import asyncio
import dataclasses
import time

import grpc
import pytest
from grpc import aio

from protos import gang_pb2, inference_pb2
from protos.errors import CaravanError
from protos.status_details import retry_after_s
from router.call import CallInfo
from router.policy import Candidate
from tests.unit.router.conftest import until
from tests.unit.router.test_resume import collect
from tests.unit.router.test_service import drain, metric

LENGTH, DEADLINE = inference_pb2.FINISH_REASON_LENGTH, inference_pb2.FINISH_REASON_DEADLINE
LONG = {"text": "the sea", "max_tokens": 200, "ignore_eos": True}


def small(house, running: int = 0, max_num_seqs: int = 2) -> None:
    """Makes the rank one that runs two sequences, and says so."""
    rank = house.ranks[0]
    rank.load = gang_pb2.RankLoad(running=running, max_num_seqs=max_num_seqs)
    for link in house.links:
        link.load = rank.load


async def test_the_deadline_travels_to_the_rank_and_ends_the_call(house):
    house.ranks[0].step_s = 0.01
    responses, error = await drain(
        house.inference.Generate(inference_pb2.GenerateRequest(**LONG, timeout_s=0.3), timeout=20)
    )
    assert error is not None and error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "deadline of 0.3 s passed while it was worked on" in error.details()
    assert (responses[-1].finish_reason, responses[-1].detail) == (DEADLINE, error.details())
    assert responses[-1].usage.completion_tokens == sum(len(r.token_ids) for r in responses) > 5
    assert 0.2 < house.ranks[0].submits[0].timeout_s <= 0.3
    await until(lambda: house.ranks[0].aborts)
    assert metric(house, "caravan_requests_total", finish_reason="deadline", status="DEADLINE_EXCEEDED") == 1


async def test_the_call_s_own_deadline_counts_too(house):
    house.ranks[0].step_s = 0.01
    with pytest.raises(aio.AioRpcError) as caught:
        async for _ in house.inference.Generate(inference_pb2.GenerateRequest(**LONG, timeout_s=9), timeout=0.3):
            pass
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0.2 < house.ranks[0].submits[0].timeout_s <= 0.3
    await until(lambda: house.ranks[0].aborts)
    # But it is not the resumable request's own.
    call = CallInfo(deadline_s=0.01)
    request = inference_pb2.GenerateRequest(**{**LONG, "max_tokens": 5}, request_id="r", resumable=True)
    assert (await collect(house.service, request, call)).finish_reason == "length"
    assert not house.ranks[0].submits[1].HasField("timeout_s")
    with pytest.raises(CaravanError, match="deadline had passed when the request arrived") as late:
        await collect(house.service, inference_pb2.GenerateRequest(**LONG), CallInfo(deadline_s=0))
    assert late.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: metric(house, "caravan_streams_running") == 0)


async def test_a_stuck_rank_does_not_hold_a_deadline_up(house):
    house.ranks[0].running.clear()
    start = time.monotonic()
    with pytest.raises(CaravanError, match="passed while it was worked on"):
        await collect(house.service, inference_pb2.GenerateRequest(**LONG, timeout_s=0.1))
    assert time.monotonic() - start < 0.5


async def test_a_rank_that_ends_it_first_is_believed(house):
    house.ranks[0].running.clear()
    task = asyncio.create_task(collect(house.service, inference_pb2.GenerateRequest(**LONG, timeout_s=30)))
    await until(lambda: house.ranks[0].submits)
    sequence_id = house.ranks[0].submits[0].sequence_id
    ended = gang_pb2.SequenceOutput(sequence_id=sequence_id, finish_reason=DEADLINE)
    house.ranks[0].send(house.ranks[0].output(ended))
    with pytest.raises(CaravanError, match="deadline passed") as caught:
        await task
    assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert not house.ranks[0].aborts


async def test_a_rank_gets_no_more_than_it_has_room_for(house):
    small(house)
    house.ranks[0].running.clear()
    tasks = [asyncio.create_task(collect(house.service, inference_pb2.GenerateRequest(**LONG))) for _ in range(8)]
    await until(lambda: metric(house, "caravan_queued_tokens") > 0)
    await asyncio.sleep(0.05)
    assert len(house.ranks[0].submits) == 3  # Two that run and one that waits there.
    house.ranks[0].running.set()
    assert {done.finish_reason for done in await asyncio.gather(*tasks)} == {"length"}
    assert metric(house, "caravan_queued_tokens") == 0
    assert metric(house, "caravan_queue_wait_seconds_count") == 8


async def test_priorities_and_tenants_are_decided_before_the_rank(house):
    small(house)
    house.ranks[0].running.clear()

    def send(name: str, **fields) -> asyncio.Task:
        request = inference_pb2.GenerateRequest(text="the sea", max_tokens=2, request_id=name, **fields)
        return asyncio.create_task(collect(house.service, request))

    tasks = [send(f"first {n}") for n in range(3)]
    await until(lambda: len(house.ranks[0].submits) == 3)
    tasks += [send(f"greedy {n}", tenant="greedy") for n in range(6)]
    await asyncio.sleep(0.02)
    tasks += [send("modest", tenant="modest"), send("urgent", tenant="greedy", priority=1)]
    await asyncio.sleep(0.02)
    house.ranks[0].running.set()
    await asyncio.gather(*tasks)
    order = [submit.request_id for submit in house.ranks[0].submits][3:]
    assert order[0] == "urgent" and order.index("modest") <= 2


async def test_a_deadline_that_passes_in_the_queue(house):
    small(house, max_num_seqs=1)
    house.ranks[0].running.clear()
    running = [asyncio.create_task(collect(house.service, inference_pb2.GenerateRequest(**LONG))) for _ in range(2)]
    await until(lambda: len(house.ranks[0].submits) == 2)
    responses, error = await drain(house.inference.Generate(inference_pb2.GenerateRequest(**LONG, timeout_s=0.1)))
    assert error is not None and error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "passed while it waited for a rank" in error.details() and not responses
    assert len(house.ranks[0].submits) == 2 and not house.ranks[0].aborts
    assert metric(house, "caravan_queued_tokens") == 0
    house.ranks[0].running.set()
    await asyncio.gather(*running)


async def test_overload_is_refused_with_a_delay_that_is_data(build, config):
    house = await build(config=dataclasses.replace(config, max_queued_tokens=1000))
    small(house, max_num_seqs=1)
    house.ranks[0].running.clear()
    tasks = [asyncio.create_task(collect(house.service, inference_pb2.GenerateRequest(**LONG))) for _ in range(4)]
    await until(lambda: metric(house, "caravan_queued_tokens") > 400)
    took = []
    for rpc in (house.inference.Generate, house.inference.GenerateOnce) * 3:
        start = time.perf_counter()
        call = rpc(inference_pb2.GenerateRequest(**LONG))
        with pytest.raises(aio.AioRpcError) as caught:
            await (call.read() if rpc is house.inference.Generate else call)
        took.append(time.perf_counter() - start)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        delay = retry_after_s(tuple(caught.value.trailing_metadata()))
        assert delay is not None and 0.05 < delay < 5
        assert f"send it again in {delay:.1f} s" in caught.value.details()
    house.ranks[0].running.set()
    await asyncio.gather(*tasks)
    assert metric(house, "caravan_requests_total", finish_reason="error", status="RESOURCE_EXHAUSTED") == 6
    assert sorted(took)[2] < 0.05
    assert metric(house, "caravan_streams_running") == 0


async def test_a_tenant_s_quota(build, config):
    house = await build(config=dataclasses.replace(config, tenant_tokens_per_minute={"t": 40}))
    await house.generate(text="the sea", max_tokens=30, tenant="t")
    with pytest.raises(aio.AioRpcError, match="tenant 't' may use 40 tokens a minute") as caught:
        await house.generate(text="the sea", max_tokens=30, tenant="t")
    assert 10 < retry_after_s(tuple(caught.value.trailing_metadata())) < 60
    await house.generate(text="the sea", max_tokens=30)


async def test_who_waits_is_told_when_the_router_closes(house):
    small(house, max_num_seqs=1)
    house.ranks[0].running.clear()
    tasks = [asyncio.create_task(collect(house.service, inference_pb2.GenerateRequest(**LONG))) for _ in range(5)]
    await until(lambda: metric(house, "caravan_queued_tokens") > 400)
    await house.service.close()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert {error.code for error in errors} == {grpc.StatusCode.UNAVAILABLE}
    assert {str(error) for error in errors} == {"the router shuts down; send the request again"}
    with pytest.raises(CaravanError, match="no gang is ready"):
        await collect(house.service, inference_pb2.GenerateRequest(**LONG))


async def test_who_waits_is_told_when_the_gang_goes(house):
    small(house, max_num_seqs=1)
    house.ranks[0].running.clear()
    tasks = [asyncio.create_task(collect(house.service, inference_pb2.GenerateRequest(**LONG))) for _ in range(50)]
    await until(lambda: len(house.ranks[0].submits) == 2)
    house.leader.view.state, house.leader.view.detail = "failed", "out of memory"
    house.leader.tell()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert {error.code for error in errors} == {grpc.StatusCode.UNAVAILABLE}
    assert sum("no gang is ready any more" in str(error) for error in errors) == 48


async def test_a_client_that_leaves_the_queue_leaves_nothing(house):
    small(house, max_num_seqs=1)
    house.ranks[0].running.clear()
    tasks = [asyncio.create_task(collect(house.service, inference_pb2.GenerateRequest(**LONG))) for _ in range(6)]
    await until(lambda: len(house.ranks[0].submits) == 2 and metric(house, "caravan_queued_tokens") > 800)
    for task in reversed(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: len(house.ranks[0].aborts) == 2)
    assert metric(house, "caravan_queued_tokens") == metric(house, "caravan_streams_running") == 0
    assert not house.service._registry._running
    house.ranks[0].running.set()
    assert (await house.generate(text="the sea", max_tokens=2))[-1].finish_reason == LENGTH
    assert len(house.ranks[0].submits) == 3


async def test_it_waits_in_the_queue_with_a_bound(build, config):
    house = await build(config=dataclasses.replace(config, stream_stall_s=0.1))
    small(house, running=9, max_num_seqs=1)
    with pytest.raises(CaravanError, match=r"no rank had room in 0\.1 s") as caught:
        await collect(house.service, inference_pb2.GenerateRequest(**LONG))
    assert caught.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_room():
    def rank(**fields) -> Candidate:
        return Candidate(**{"gang_id": "g", "rank": 0, "pending_tokens": 0, "sequences": 1, **fields})

    assert rank(sequences=10**6).has_room(1)  # It does not say how many it runs.
    assert rank(max_sequences=4, sequences=4).has_room(1) and not rank(max_sequences=4, sequences=5).has_room(1)
    assert rank(max_sequences=64, sequences=67).has_room(1) and not rank(max_sequences=64, sequences=68).has_room(1)
    assert not rank(max_sequences=4, free_kv_tokens=9).has_room(10)
    assert rank(max_sequences=4, free_kv_tokens=-5, sequences=0).has_room(10)  # Alone, whatever it holds.


async def test_the_load_a_link_counts_with(house):
    link = house.links[0]
    small(house)
    house.ranks[0].running.clear()
    tasks = [asyncio.create_task(collect(house.service, inference_pb2.GenerateRequest(**LONG))) for _ in range(2)]
    await until(lambda: len(house.ranks[0].submits) == 2)
    assert link.candidate().sequences == 2
    link._submitted.clear()  # As if the rank had told of them.
    link.load = gang_pb2.RankLoad(running=2, max_num_seqs=2, kv_capacity_tokens=1000, kv_usage_ratio=0.25)
    assert (link.candidate().sequences, link.candidate().free_kv_tokens) == (2, 750)
    tasks[0].cancel()
    await asyncio.sleep(0.01)
    assert link.candidate().sequences == 1  # The abort counts before the rank tells.
    link.update(1, gang_pb2.RankLoad(running=7))  # What the leader says is news as long as the rank is silent.
    assert link.load.running == 7
    link._told_load_at = time.monotonic()
    link.update(1, gang_pb2.RankLoad(running=5))
    assert link.load.running == 7
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
