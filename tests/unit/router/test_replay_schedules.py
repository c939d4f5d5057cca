"""Whatever befalls ranks, wires and leaders, and in whatever order: clients get what they would have got."""

import asyncio
import dataclasses
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos import gang_pb2, inference_pb2
from protos.client import Completion
from router import service
from router.config import RouterConfig
from tests.unit.router.replay_world import Call, World, open_world

MANY = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
RANKS = st.tuples(st.integers(0, 1), st.integers(0, 1))
CALLS = st.integers(0, 3)
ACTIONS = st.one_of(
    st.tuples(st.sampled_from(["hear", "step", "deliver", "turn"]), RANKS),
    st.tuples(st.sampled_from(["hear", "step", "deliver", "turn"]), RANKS),
    st.tuples(st.sampled_from(["cut", "cut, late", "kill", "give up", "ghost", "enter"]), RANKS),
    st.tuples(st.sampled_from(["view", "reshape", "reshape, entered later", "starting", "restart"]), RANKS),
    st.tuples(st.sampled_from(["wait"]), st.sampled_from([0.001, 0.06, 0.4])),
)
ENDS = st.tuples(st.sampled_from(["cancel", "leave"]), CALLS)


@pytest.fixture(scope="module")
def quick(checkpoint):
    """The checkpoint is read once."""
    loaded = service.load(RouterConfig(model_dir=checkpoint))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "load", lambda config: loaded)
        yield RouterConfig(model_dir=checkpoint, max_replays=10**6, replay_wait_s=10**6, reconnect_max_s=0.1)


def requests(seed: int, timeout_s: float | None = None) -> list[inference_pb2.GenerateRequest]:
    """Four that have everything there is to get wrong among them."""
    some = random.Random(seed)
    made = []
    for number in range(4):
        request = inference_pb2.GenerateRequest(
            text="the sea and the whale"[: some.randint(3, 21)], max_tokens=some.randint(1, 14),
            seed=some.randint(0, 99), temperature=some.choice([0.0, 1.0]), min_tokens=some.choice([0, 1]),
            sibling=number,
            stop=some.choice([[], [], ["e"], ["a", "th"]]), ignore_eos=some.random() < 0.5,
            stop_token_ids=some.sample(range(300), some.choice([0, 40])), frequency_penalty=some.choice([0.0, 0.5]),
            request_id=f"r{number}",
        )  # fmt: skip
        if some.random() < 0.5:
            request.logprobs = 1
        if some.random() < 0.5:
            request.prompt_logprobs = 1
            request.max_tokens = some.choice([0, request.max_tokens])
            request.min_tokens = min(request.min_tokens, request.max_tokens)
        if timeout_s is not None and number % 2:
            request.timeout_s = timeout_s
        made.append(request)
    return made


def undisturbed(config: RouterConfig, made: list[inference_pb2.GenerateRequest]) -> list[Completion]:
    async def run() -> list[Completion]:
        world = World(config)
        await world.start()
        for request in made:
            plain = inference_pb2.GenerateRequest()
            plain.CopyFrom(request)
            plain.ClearField("timeout_s")
            world.call(plain)
        await world.settle()
        await world.heal()
        world.check_nothing_is_left()
        assert not any(call.error for call in world.calls), [call.error for call in world.calls]
        assert world.metric("caravan_streams_replayed_total", reason="connection") == 0
        return [call.done for call in world.calls]

    with open_world() as loop:
        return loop.run_until_complete(run())


async def act(world: World, action: str, on) -> None:
    if action == "wait":
        await asyncio.sleep(on)
        return
    if action in ("cancel", "leave"):
        call = world.calls[on]
        if action == "leave":
            call.task.cancel()
        else:
            await world.core.cancel(inference_pb2.CancelRequest(request_id=call.request.request_id))
        await world.settle()
        return
    gang, number = on
    gang %= len(world.ranks)
    rank = world.ranks[gang][number]
    match action:
        case "hear" if rank.is_alive:
            rank.hear()
        case "step" if rank.is_alive:
            rank.step()
        case "deliver":
            world.deliver(rank)
        case "turn":
            await world.turn()
        case "cut" | "cut, late":
            world.cut(rank, is_late="late" in action)
        case "kill":
            world.kill(rank)
        case "give up":
            rank.give_up()
        case "ghost":  # Of an epoch before theirs, with tokens for streams that run.
            rank.say([gang_pb2.SequenceOutput(sequence_id=each, token_ids=[7, 7]) for each in rank.sequences], epoch=0)
        case "enter":
            rank.epoch = world.epochs[gang]
        case "view":
            world.view(gang)
        case "reshape" | "reshape, entered later":
            world.reshape(gang, at_once=action == "reshape")
            world.view(gang)
        case "starting":
            world.states[gang] = "starting"
            world.view(gang)
            world.states[gang] = "ready"
        case "restart":
            for each in world.ranks[gang]:
                world.kill(each)
            world.reshape(gang)
            world.view(gang)
    await world.settle()


def disturbed(config: RouterConfig, made, actions, num_gangs: int = 1) -> World:
    async def run() -> World:
        world = World(config, num_gangs)
        await world.start()
        for request in made:
            world.call(request)
        await world.settle()
        for action, on in actions:
            await act(world, action, on)
        await world.heal()
        world.check_nothing_is_left()
        return world

    with open_world() as loop:
        return loop.run_until_complete(run())


def check_same(call: Call, whole: Completion) -> None:
    assert call.error is None, call.error
    done = call.done
    assert (done.token_ids, done.text, done.finish_reason) == (whole.token_ids, whole.text, whole.finish_reason)
    assert done.logprobs == whole.logprobs and done.prompt_logprobs == whole.prompt_logprobs
    assert done.usage == whole.usage and done.seed == whole.seed


def check_begins(call: Call, whole: Completion) -> None:
    """It is what it would have been, as far as it got."""
    done = call.done
    assert whole.token_ids[: len(done.token_ids)] == done.token_ids
    assert whole.text.startswith(done.text)
    assert whole.logprobs[: len(done.logprobs)] == done.logprobs


@MANY
@given(seed=st.integers(0, 10**6), actions=st.lists(ACTIONS, max_size=40), num_gangs=st.integers(1, 2))
def test_nothing_is_lost_or_doubled(quick, seed, actions, num_gangs) -> None:
    made = requests(seed)
    world = disturbed(quick, made, actions, num_gangs)
    for call, whole in zip(world.calls, undisturbed(quick, made), strict=True):
        check_same(call, whole)


@MANY
@given(
    seed=st.integers(0, 10**6),
    actions=st.lists(st.one_of(ACTIONS, ACTIONS, ENDS), max_size=40),
    timeout_s=st.sampled_from([None, 0.001, 0.05, 0.5]),
    max_replays=st.integers(0, 3),
    replay_wait_s=st.sampled_from([0.05, 0.3, 10**6]),
    max_num_seqs=st.sampled_from([0, 1]),
)
def test_what_ends_early_leaves_nothing(quick, seed, actions, timeout_s, max_replays, replay_wait_s, max_num_seqs):
    made = requests(seed, timeout_s)
    config = dataclasses.replace(quick, max_replays=max_replays, replay_wait_s=replay_wait_s)

    async def run() -> World:
        world = World(config)
        for rank in world.ranks[0]:
            rank.max_num_seqs = max_num_seqs
        await world.start()
        for request in made:
            world.call(request)
        await world.settle()
        for action, on in actions:
            await act(world, action, on)
        await world.heal()
        world.check_nothing_is_left()
        return world

    with open_world() as loop:
        world = loop.run_until_complete(run())
    for call, whole in zip(world.calls, undisturbed(quick, made), strict=True):
        check_begins(call, whole)
        if call.error is None and not call.task.cancelled():
            check_same(call, whole)
        elif call.error is not None:
            assert call.error.code.name in ("UNAVAILABLE", "INTERNAL", "CANCELLED", "DEADLINE_EXCEEDED")
