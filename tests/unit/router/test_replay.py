"""Streams whose rank is lost: where they go, what they take with them, what they cost."""

import asyncio
import logging

import pytest
from google.protobuf.json_format import MessageToDict

from protos import gang_pb2
from tests.unit.router.replay_scenes import begin, request, whole_answer
from tests.unit.router.replay_world import World


def test_a_submission_says_all_that_the_rest_depends_on(play) -> None:
    async def scene(world: World) -> None:
        await begin(world, timeout_s=9, logprobs=1, prompt_logprobs=2, min_tokens=4, stop_token_ids=[3], tenant="t")
        (rank,) = [rank for rank in world.ranks[0] if rank.submits]
        await asyncio.sleep(2)
        world.kill(rank)
        await world.settle()
        world.ranks[0][1 - rank.rank].hear()
        (first,), (second,) = rank.submits, world.ranks[0][1 - rank.rank].submits
        assert list(second.output_ids) == world.calls[0].done.token_ids and len(second.output_ids) == 3
        assert second.sequence_id != first.sequence_id
        assert second.timeout_s == pytest.approx(first.timeout_s - 2)
        for each in (first, second):
            for name in ("output_ids", "sequence_id", "timeout_s"):
                each.ClearField(name)
        assert MessageToDict(first) == MessageToDict(second)
        await world.heal()
        world.check_nothing_is_left()
        assert len(world.calls[0].done.prompt_logprobs) == world.calls[0].done.usage.prompt_tokens - 1

    play(scene)


def test_the_prompt_s_log_probabilities_are_asked_for_again_until_they_came(play) -> None:
    async def scene(world: World) -> None:
        await begin(world, prompt_logprobs=1, tokens=0)
        for _ in range(3):
            rank = next(rank for rank in world.ranks[0] if not rank.wire.outbox.empty())
            rank.hear()
            rank.step()  # Its message never arrives.
            world.cut(rank)
            await asyncio.sleep(1)
        await world.heal()
        done = world.calls[0].done
        assert len(done.prompt_logprobs) == done.usage.prompt_tokens - 1 and done.usage.cached_tokens == 3
        assert world.metric("caravan_streams_replayed_total", reason="connection") == 3
        assert world.metric("caravan_replay_gap_seconds_count") == 1
        assert world.metric("caravan_replay_gap_seconds_sum") == pytest.approx(3, abs=0.1)

    play(scene)


def test_an_epoch_does_not_disturb_who_lives(play) -> None:
    whole = whole_answer(play)

    async def scene(world: World) -> None:
        await begin(world, count=2)
        for entered_later in (False, True):
            for rank in world.ranks[0]:
                rank.hear()
                rank.step()  # Still of the old epoch, and on its way.
            world.reshape(at_once=not entered_later)
            world.view()
            await world.turn()
            for rank in world.ranks[0]:
                rank.epoch = world.epochs[0]
            await world.turn()
        await world.heal()
        world.check_nothing_is_left()
        assert sum(len(rank.submits) for rank in world.ranks[0]) == 2
        assert world.metric("caravan_router_fenced_messages_total") == 0
        assert world.calls[0].done.token_ids == whole

    play(scene)


@pytest.mark.parametrize("who_is_late", ["router", "rank"])
def test_a_submission_of_another_epoch_is_made_again(play, who_is_late) -> None:
    async def scene(world: World) -> None:
        world.reshape(at_once=who_is_late == "router")
        if who_is_late == "rank":
            world.view()
        await begin(world, tokens=0)
        await world.turn()
        await world.turn()
        if who_is_late == "rank":  # It is given a moment.
            await asyncio.sleep(0.06)
            await world.turn()
        assert len(world.calls[0].done.token_ids) >= 1
        assert world.metric("caravan_streams_replayed_total", reason="refused") == 1
        await world.heal()
        world.check_nothing_is_left()

    play(scene, num_ranks=1, max_replays=0)


def test_nothing_goes_where_the_view_does_not_say_ready(play) -> None:
    async def scene(world: World) -> None:
        await begin(world)
        lost = next(rank for rank in world.ranks[0] if rank.submits)
        other = world.ranks[0][1 - lost.rank]
        view = gang_pb2.GangView()
        view.CopyFrom(world.core._gangs.views[0])
        view.ranks[other.rank].state = "draining"
        world.core._gangs._gangs[0].take_view(view)
        world.kill(lost)
        await world.turn()
        assert not other.submits and not world.calls[0].is_over and not world.core.is_ready
        world.view()
        await world.turn()
        assert other.submits and world.core.is_ready
        await world.heal()
        world.check_nothing_is_left()

    play(scene)


def test_all_links_of_a_view_are_judged_before_anything_is_placed(play) -> None:
    async def scene(world: World) -> None:
        await begin(world, count=4)
        old = list(world.ranks[0])
        for rank in old:  # Their connections still stand.
            rank.is_alive = False
        world.view()
        await world.settle()
        assert [len(rank.submits) for rank in old] == [2, 2]
        assert all(rank.wire is None or rank.wire.outbox.empty() for rank in old)
        await world.heal()
        world.check_nothing_is_left()
        assert world.metric("caravan_streams_replayed_total", reason="dead") == 4

    play(scene)


def test_no_gang_that_computes_otherwise_takes_it(play) -> None:
    async def scene(world: World) -> None:
        world.dtypes[1] = "bfloat16"
        world.ranks[1][0].max_num_seqs = 1
        world.view(1)
        await begin(world, count=3)
        world.kill(world.ranks[0][0])
        world.view(0)
        await world.settle()
        num_submits = len(world.ranks[1][0].submits)
        for _ in range(100):
            await world.turn()
        newcomer = world.call(request(max_tokens=2))  # It does not wait for them.
        for _ in range(5):
            await world.turn()
        assert newcomer.is_over
        assert len(world.ranks[1][0].submits) == num_submits + 1
        while not all(call.is_over for call in world.calls):
            await asyncio.sleep(0.1)
        said = [call.error.message for call in world.calls if call.error is not None]
        needs = "gang-1 computes in bfloat16 and takes 256 tokens; needed are float32 and"
        assert said and all(needs in each for each in said)
        world.check_nothing_is_left()

    play(scene, num_gangs=2, num_ranks=1, replay_wait_s=5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_gang_goes_on_if_it_computes_the_same(play, dtype) -> None:
    whole = whole_answer(play)

    async def scene(world: World) -> None:
        world.dtypes[1] = dtype
        world.view(1)
        await begin(world, count=2)  # One at each gang.
        assert all(gang[0].submits for gang in world.ranks)
        first = world.calls[0] if len(world.ranks[0][0].sequences) else world.calls[1]
        world.kill(world.ranks[0][0])
        world.states[0] = "failed"
        world.view(0)
        await world.settle()
        if dtype == "float32":
            await world.heal()
            assert not any(call.error for call in world.calls)
            assert whole in [call.done.token_ids for call in world.calls]
        else:
            assert first.error.message == "gang-0 failed: out of memory"
            await world.heal()
        world.check_nothing_is_left()

    play(scene, num_gangs=2, num_ranks=1)


def test_tokens_are_charged_once(play) -> None:
    async def scene(world: World) -> None:
        call = request(tenant="t", request_id="r")
        world.call(call)
        await world.settle()
        admission = world.core._dispatcher._admission
        served: list[int] = []
        keep = admission.served
        admission.served = lambda tokens: (served.append(tokens), keep(tokens))
        left = admission._quotas.take("t", 1)
        for _ in range(5):
            await world.turn()
            world.kill(next(rank for rank in world.ranks[0] if rank.sequences))
            world.reshape()
            world.view()
            await world.settle()
        await world.heal()
        usage = world.calls[0].done.usage
        assert sum(served) == usage.prompt_tokens + usage.completion_tokens == usage.prompt_tokens + 30
        assert not left
        # 100 a minute less what it used: the same again would be too much, what is left is not.
        assert admission._quotas.take("t", 100 - 1 - sum(served)) == 0
        assert admission._quotas.take("t", 5) > 0
        assert world.metric("caravan_prompt_tokens_total") == usage.prompt_tokens
        assert world.metric("caravan_output_tokens_total") == 30
        assert world.metric("caravan_queue_wait_seconds_count") == 1
        assert world.metric("caravan_time_to_first_token_seconds_count") == 1

    play(scene, tokens_per_minute=100)


def test_an_event_is_one_line_however_many_streams_it_concerns(play, caplog) -> None:
    async def scene(world: World) -> None:
        await begin(world, count=8)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            world.kill(world.ranks[0][0])
            await world.settle()
        assert len(caplog.records) == 1
        assert "4 streams have to go on elsewhere" in caplog.text
        await world.heal()

    play(scene)


def test_tokens_of_an_epoch_before_a_stream_s_own_are_not_taken_for_it(play) -> None:
    whole = whole_answer(play)

    async def scene(world: World) -> None:
        await begin(world, tokens=0)
        (rank,) = world.ranks[0]
        rank.hear()
        rank.say([gang_pb2.SequenceOutput(sequence_id=each, token_ids=[7, 7]) for each in rank.sequences], epoch=0)
        await world.heal()
        world.check_nothing_is_left()
        assert world.calls[0].done.token_ids == whole
        assert world.metric("caravan_streams_replayed_total", reason="fenced") == 1

    play(scene, num_ranks=1)


def test_a_view_of_a_past_epoch_is_dropped(play) -> None:
    async def scene(world: World) -> None:
        await begin(world)
        world.reshape()
        world.view()
        world.epochs[0] = 1
        world.ranks[0][0].is_alive = False
        world.view()
        assert world.core._gangs.views[0].epoch == 2
        assert world.metric("caravan_router_fenced_messages_total") == 1
        world.epochs[0], world.ranks[0][0].is_alive = 2, True
        await world.heal()
        world.check_nothing_is_left()
        assert world.metric("caravan_streams_replayed_total", reason="dead") == 0

    play(scene)
