"""Sequences that end before their time, and those that end without a token."""

import time

import pytest

from protos import gang_pb2, inference_pb2
from tests.local_engine import LocalRank, engine_config, greedy, prompt
from workers.block_pool import KVBlocks
from workers.inbox import Add, Cancel
from workers.scheduler import Finish, Scheduler
from workers.sequence import Sample, SamplingParams, Sequence
from workers.token_server import TokenServer, _output

CHUNK = 16


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(KVBlocks(32, 32, 4, CHUNK), max_num_batched_tokens=24, max_num_seqs=4)


def sequence(number: int, router: str = "a", prompt: int = 10, max_tokens: int = 5, **more) -> Sequence:
    return Sequence(
        key=(router, number), prompt_ids=[1] * prompt, sampling=SamplingParams(), max_tokens=max_tokens, **more
    )


def step(scheduler: Scheduler):
    plan = scheduler.plan()
    emitted = scheduler.commit(plan, [Sample(7) for item in plan if item.samples])
    scheduler.check_integrity()
    return emitted


def test_a_deadline_ends_what_runs_and_what_waits(scheduler):
    for number in range(8):
        scheduler.add(sequence(number, deadline=100.0 + number))
    step(scheduler)
    assert scheduler.num_running == 4
    assert scheduler.expire(99) == []
    ended = scheduler.expire(105)
    assert sorted(item.sequence.key[1] for item in ended) == [0, 1, 2, 3, 4, 5]
    assert {(item.finish, item.sample) for item in ended} == {(Finish.DEADLINE, None)}
    scheduler.check_integrity()
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 2)
    while scheduler.plan():
        step(scheduler)
        scheduler.expire(200)
    assert scheduler.kv_usage_ratio == 0
    assert scheduler.expire(300) == []


def test_deadlines_of_what_ended_are_forgotten(scheduler):
    for number in range(1000):
        scheduler.add(sequence(number, deadline=1e9, max_tokens=1, prompt=1))
        step(scheduler)
    assert len(scheduler._deadlines) < 100


def test_a_cancel_ends_what_other_routers_submitted(scheduler):
    scheduler.add(sequence(1, "a", request=("t", "r", 0)))
    scheduler.add(sequence(2, "a", request=("t", "r", 1)))
    scheduler.add(sequence(3, "a", request=("", "r", 0)))
    scheduler.add(sequence(1, "b", request=("t", "r", 0)))
    step(scheduler)
    ended = scheduler.cancel("b", "t", "r", 0)
    assert [(item.sequence.key, item.finish, item.sample) for item in ended] == [(("a", 1), Finish.ABORT, None)]
    assert {item.sequence.key for item in scheduler.cancel("c", "t", "r", None)} == {("a", 2), ("b", 1)}
    scheduler.check_integrity()
    assert scheduler.num_running == 1
    assert scheduler.cancel("b", "t", "r", None) == []


def test_a_prompt_alone_ends_without_a_token(scheduler):
    alone = sequence(1, prompt=30, max_tokens=0)
    scheduler.add(alone)
    scheduler.add(sequence(2, prompt=3))
    emitted = []
    for _ in range(3):
        alone.prompt_logprobs = ["filled by the runner"]
        emitted += [item for item in step(scheduler) if item.sequence is alone]
    assert [(item.sample, item.finish, item.prompt_logprobs) for item in emitted] == [
        (None, Finish.LENGTH, ["filled by the runner"])
    ]
    assert alone.output_ids == []
    for _ in range(5):
        step(scheduler)
    assert (scheduler.num_running, scheduler.kv_usage_ratio) == (0, 0)


class Inbox:
    def __init__(self) -> None:
        self.messages = []

    def put(self, message) -> None:
        self.messages.append(message)


@pytest.fixture
def server() -> TokenServer:
    return TokenServer(gang_pb2.StepOutput(gang_id="g", epoch=1), Inbox(), vocab_size=100, max_model_len=20)


def submit(**fields) -> gang_pb2.Submit:
    return gang_pb2.Submit(**{"sequence_id": 1, "epoch": 1, "prompt_ids": [1, 2], "max_tokens": 3, **fields})


def test_a_deadline_counts_from_the_receipt(server):
    server._submit("a", submit(timeout_s=5), None)
    server._submit("a", submit(tenant="t", request_id="r", sibling=2), None)
    first, second = (message.sequence for message in server._inbox.messages)
    assert 4 < first.deadline - time.monotonic() <= 5
    assert (second.deadline, second.request) == (None, ("t", "r", 2))


def test_no_output_is_for_prompt_logprobs_alone(server):
    assert "max_tokens (0)" in server._refusal(submit(max_tokens=0))
    wanted = gang_pb2.Sampling(prompt_logprobs=0)
    assert server._refusal(submit(max_tokens=0, sampling=wanted)) is None
    assert server._refusal(submit(max_tokens=0, sampling=wanted, prompt_ids=[1] * 20)) is None
    assert server._refusal(submit(max_tokens=0, sampling=wanted, prompt_ids=[1] * 21)) is not None


async def test_a_cancel_reaches_the_inbox(server):
    async def messages():
        yield gang_pb2.RouterMessage(cancel=gang_pb2.Cancel(request_id="r", tenant="t"))
        yield gang_pb2.RouterMessage(cancel=gang_pb2.Cancel(request_id="r", sibling=0))

    await server._read("a", messages(), None)
    assert server._inbox.messages == [Cancel("a", "t", "r", None), Cancel("a", "", "r", 0)]


def test_an_end_without_a_token(scheduler):
    scheduler.add(sequence(1, deadline=1.0))
    output = _output(1, scheduler.expire(2)[0])
    assert output == gang_pb2.SequenceOutput(sequence_id=1, finish_reason=inference_pb2.FINISH_REASON_DEADLINE)


# ---- with the real model -------------------------------------------------------------------------------------------


def test_the_engine_ends_a_sequence_at_the_next_step_and_says_so(maverick):
    rank = LocalRank(engine_config(maverick.folder))
    rank.inbox.put(Add(greedy(1, prompt(1, 40), 1000, deadline=time.monotonic() + 0.2)))
    rank.inbox.put(Add(greedy(2, prompt(2, 40), 1000, request=("t", "r", 0))))
    steps = 0
    while rank.scheduler.num_running != 1:
        assert rank.engine.step() and steps < 1000
        steps += 1
    assert [item.finish for _, emitted in rank.emitted for item in emitted if item.sequence.key[1] == 1][-1] is (
        Finish.DEADLINE
    )
    rank.inbox.put(Cancel("another", "t", "r", None))
    assert not rank.engine.step()
    _, emitted = rank.emitted[-1]
    assert [(item.sequence.key[1], item.finish, item.sample) for item in emitted] == [(2, Finish.ABORT, None)]
    load = rank.engine.load
    assert (load.running, load.waiting, load.kv_usage_ratio) == (0, 0, 0)
    assert load.max_num_seqs == 16 and load.kv_capacity_tokens > 100
    rank.scheduler.check_integrity()


@pytest.mark.parametrize("length", [1, 2, 150])
def test_a_prompt_alone_gets_the_log_probabilities_it_would_get_with_an_output(maverick, length):
    rank = LocalRank(engine_config(maverick.folder))
    sampling = SamplingParams(prompt_logprobs=2)
    for number, max_tokens in ((1, 0), (2, 1)):
        rank.inbox.put(Add(Sequence(("router", number), prompt(7, length), sampling, max_tokens)))
        while rank.engine.step():
            pass
    ended = {item.sequence.key[1]: item for _, emitted in rank.emitted for item in emitted if item.finish}
    assert ended[1].finish is ended[2].finish is Finish.LENGTH
    assert ended[1].sample is None and ended[2].sample is not None
    assert len(ended[1].prompt_logprobs) == length - 1
    assert ended[1].prompt_logprobs == ended[2].prompt_logprobs
    assert rank.engine.load.kv_usage_ratio == 0
