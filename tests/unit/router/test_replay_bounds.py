"""Streams whose rank is lost: how long they wait, in which order, and when they are given up."""

import asyncio

import pytest

from protos import inference_pb2
from protos.errors import CaravanError
from router.config import RouterConfig
from router.errors import RouterConfigError
from tests.unit.router.replay_scenes import begin, request
from tests.unit.router.replay_world import World
from tests.unit.router.test_resume import collect


def test_a_rank_that_refuses_everything_is_not_asked_for_ever(play) -> None:
    async def scene(world: World) -> None:
        await begin(world, tokens=0)
        (rank,) = world.ranks[0]
        while not world.calls[0].is_over:
            rank.hear()
            rank.give_up()
            while rank.wire.down:
                world.deliver(rank)
            await asyncio.sleep(0.06)
        assert world.calls[0].error.code.name == "UNAVAILABLE"
        assert "rank 0 of gang-0 does not go on with it: draining, and within 3 s" in world.calls[0].error.message
        assert 20 < len(rank.submits) < 100
        world.check_nothing_is_left()

    play(scene, num_ranks=1, replay_wait_s=3)


def test_the_wait_is_bounded_and_says_what_for(play) -> None:
    async def scene(world: World) -> None:
        await begin(world, count=2)
        started = asyncio.get_running_loop().time()
        world.kill(world.ranks[0][0])
        world.states[0] = "starting"
        world.view()
        await world.settle()
        assert not world.core.is_ready
        with pytest.raises(CaravanError, match="no gang is ready"):  # Newcomers are refused, as ever.
            await collect(world.core, request())
        while not all(call.is_over for call in world.calls):
            await asyncio.sleep(0.1)
        assert asyncio.get_running_loop().time() - started == pytest.approx(7, abs=0.2)
        error = world.calls[0].error
        assert error.code.name == "UNAVAILABLE"
        assert error.message == (
            "rank 0 of gang-0 died, and within 7 s no other rank could go on with the stream (gang-0 is starting); "
            "send the request again"
        ) or error.message.startswith("rank 0 of gang-0 was lost (")  # fmt: skip
        world.check_nothing_is_left()

    play(scene, num_ranks=1, replay_wait_s=7)


def test_the_bound_starts_anew_with_a_token(play) -> None:
    async def scene(world: World) -> None:
        await begin(world)
        for _ in range(3):
            world.kill(world.ranks[0][0])
            world.view()
            await asyncio.sleep(6)
            world.reshape()
            world.view()
            await world.settle()
            await world.turn()
        await world.heal()
        world.check_nothing_is_left()
        assert world.calls[0].error is None

    play(scene, num_ranks=1, replay_wait_s=7, max_replays=1)


def test_time_at_ranks_that_bring_no_token_does_not_count_and_does_not_help(play) -> None:
    async def scene(world: World) -> None:
        await begin(world)
        for _ in range(2):
            assert not world.calls[0].is_over
            world.kill(world.ranks[0][0])
            world.view()
            await asyncio.sleep(4)
            world.reshape()
            world.view()
            await asyncio.sleep(20)  # It computes a long prompt, say.
        assert "within 7 s no other rank could go on" in world.calls[0].error.message
        world.check_nothing_is_left()

    play(scene, num_ranks=1, replay_wait_s=7)


def test_no_bound_but_its_turn_while_ranks_are_full(play) -> None:
    async def scene(world: World) -> None:
        for rank in world.ranks[0]:
            rank.max_num_seqs = 1
        world.view()
        await begin(world, count=4, max_tokens=200)
        world.kill(world.ranks[0][0])
        world.view()
        await world.turn()
        await world.turn()
        waiting = len(world.core._dispatcher._replays)
        assert waiting >= 1
        assert world.core.is_ready
        newcomer = world.call(request(max_tokens=2))
        for _ in range(150):
            await asyncio.sleep(0.05)
            await world.turn()
        assert len(world.core._dispatcher._replays) == waiting and not newcomer.is_over
        order = len(world.ranks[0][1].submits)
        for _ in range(400):
            await world.turn()
        # Who had started goes before who had not.
        assert world.ranks[0][1].submits[order].max_tokens == 200
        world.reshape()
        world.view()
        await world.heal()
        world.check_nothing_is_left()
        assert not any(call.error for call in world.calls)

    play(scene, replay_wait_s=1)


def test_a_small_newcomer_does_not_take_the_room_a_large_one_waits_for(play) -> None:
    async def scene(world: World) -> None:
        for rank in world.ranks[0]:
            rank.max_num_seqs = 8
        world.view()
        await begin(world, count=2, tokens=22)
        lost, other = world.ranks[0]
        other.free_kv_tokens = 20  # What was lost is some more by now.
        await world.turn()
        world.kill(lost)
        world.view()
        await world.settle()
        newcomer = world.call(request(max_tokens=3, temperature=0.0))
        await world.turn()
        assert len(other.submits) == 1 and not newcomer.is_over
        other.free_kv_tokens = 500
        await world.turn()
        await world.heal()
        world.check_nothing_is_left()
        assert [bool(each.output_ids) for each in other.submits][:2] == [False, True]

    play(scene)


def test_who_waits_in_the_queue_waits_on(play) -> None:
    async def scene(world: World) -> None:
        world.ranks[0][0].max_num_seqs = 1
        world.view()
        await begin(world, count=6)
        assert world.metric("caravan_queued_tokens") > 0
        world.kill(world.ranks[0][0])
        world.view()
        await asyncio.sleep(5)
        await world.heal()
        world.check_nothing_is_left()
        assert not any(call.error for call in world.calls)

    play(scene, num_ranks=1)


def test_who_waits_in_the_queue_waits_no_longer_than_that(play) -> None:
    async def scene(world: World) -> None:
        world.ranks[0][0].max_num_seqs = 1
        world.view()
        await begin(world, count=6)
        world.kill(world.ranks[0][0])
        world.view()
        await asyncio.sleep(6)
        world.check_nothing_is_left()
        said = [call.error.message for call in world.calls]
        assert sum("no gang has become ready again in 5 s" in each for each in said) == 4
        assert sum("no other rank could go on" in each for each in said) == 2

    play(scene, num_ranks=1, replay_wait_s=5)


def test_a_gang_that_failed_for_good_ends_the_wait(play) -> None:
    async def scene(world: World) -> None:
        await begin(world)
        world.kill(world.ranks[0][0])
        world.view()
        await asyncio.sleep(1)
        assert not world.calls[0].is_over
        world.states[0] = "failed"
        world.view()
        await world.settle()
        assert world.calls[0].error.message == "gang-0 failed: out of memory"
        assert world.calls[0].error.code.name == "UNAVAILABLE"
        world.check_nothing_is_left()

    play(scene, num_ranks=1)


def test_a_stream_that_kills_every_rank_is_stopped(play) -> None:
    async def scene(world: World) -> None:
        async def kill(times: int) -> None:
            for _ in range(times):
                assert not world.calls[0].is_over
                world.kill(next(r for r in world.ranks[0] if r.sequences or not r.wire.outbox.empty()))
                world.reshape()
                world.view()
                await world.settle()

        await begin(world, tokens=2)
        await kill(5)
        for _ in range(3):  # A token: all is forgiven.
            await world.turn()
        assert len(world.calls[0].done.token_ids) > 2
        await kill(6)
        assert world.calls[0].is_over
        error = world.calls[0].error
        assert error.code.name == "INTERNAL"
        assert error.message.startswith("the stream lost 6 ranks in a row without a token in between, the last one be")
        world.check_nothing_is_left()

    play(scene)


def test_a_deadline_passes_and_a_cancel_comes_while_it_waits(play) -> None:
    async def scene(world: World) -> None:
        await begin(world, timeout_s=3)
        await begin(world)
        world.kill(world.ranks[0][0])
        world.view()
        await asyncio.sleep(2)
        assert (await world.core.cancel(inference_pb2.CancelRequest(request_id="r1"))).found
        await asyncio.sleep(2)
        late, cancelled = (call.error for call in world.calls)
        assert (late.code.name, cancelled.code.name) == ("DEADLINE_EXCEEDED", "CANCELLED")
        assert "while it waited for another rank, its own being lost" in late.message
        world.check_nothing_is_left()

    play(scene, num_ranks=1)


def test_a_router_that_shuts_down_replays_nothing(play) -> None:
    async def scene(world: World) -> None:
        await begin(world, count=2)
        lost = world.ranks[0][0]
        world.kill(lost)
        await world.settle()
        world.ranks[0][1].is_alive = False
        world.view()
        await world.settle()
        assert len(world.core._dispatcher._replays) == 2
        await world.core.close()
        await world.settle()
        assert {call.error.message for call in world.calls} == {"the router shuts down; send the request again"}

    play(scene)


def test_the_bounds_are_checked() -> None:
    for name in ("replay_wait_s", "max_replays"):
        with pytest.raises(RouterConfigError, match=name):
            RouterConfig(model_dir="/tmp", **{name: -1})
