"""Ranks in plain processes from their start to their end, over real gRPC and Gloo, without Ray."""

import asyncio
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from protos import gang_pb2, inference_pb2
from tests.checkpoints import edit_tensors
from tests.distributed.gang import EPOCH, GANG, HOST, Router, run_rank, start_gang
from tests.distributed.processes import context
from tests.exactness import Exactness, Written
from tests.local_engine import engine_config, prompt
from workers.config import RankConfig
from workers.errors import UserError
from workers.rank import Rank

LENGTH = inference_pb2.FINISH_REASON_LENGTH
# Longer than any test: only an abort ends it. Fits the small pools' context.
ENDLESS = 1500


async def test_streams_parking_waking_and_the_end(maverick: Written, exactness: Exactness) -> None:
    async with start_gang(maverick.folder, 4) as gang:
        leader = gang.leader
        for rank in gang.ranks:
            joined = leader.last(rank, "joined")
            assert (joined.gang_id, joined.rank, joined.incarnation) == (GANG, rank, 10 + rank)
            assert joined.pid == gang.processes[rank].pid
            assert joined.host == HOST
            assert joined.address.startswith(f"{HOST}:")
            assert joined.versions["torch"] == torch.__version__
            kinds = [report.WhichOneof("message") for report in leader.reports[rank]]
            assert kinds[0] == "joined"
            assert kinds.index("loading") < kinds.index("epoch_ready")
            loading = [(report.bytes_read, report.bytes_total) for report in leader.all_of(rank, "loading")]
            assert loading == sorted(loading)
            assert loading[-1][0] == loading[-1][1] > 0
            ready = leader.last(rank, "epoch_ready")
            assert (ready.epoch, ready.dtype) == (EPOCH, "float32")
            assert 100 < ready.max_model_len <= 4096

        # Streams on every rank, of two routers on the first.
        routers = {rank: Router(gang, rank) for rank in gang.ranks}
        other = Router(gang, 0, name="router-2")
        asked = {}
        for rank, router in routers.items():
            for number in range(4):
                asked[rank, number] = prompt(10 * rank + number, 5 + 30 * number), 20 + rank
                router.submit(number, *asked[rank, number])
        other.submit(0, *asked[0, 0])
        for router in routers.values():
            await router.all_finished([0, 1, 2, 3])
        await other.all_finished([0])
        assert other.outputs[0] == routers[0].outputs[0]
        for (rank, number), (ids, count) in asked.items():
            router = routers[rank]
            assert router.finished[number].finish_reason == LENGTH
            assert len(router.outputs[number]) == count
            exactness.check(maverick.reference, ids, router.outputs[number], f"rank {rank}, stream {number}")
        for rank, router in routers.items():
            steps = [message.step for message in router.messages]
            assert steps == sorted(set(steps)), "one message a step"
            assert {(m.gang_id, m.epoch, m.rank, m.incarnation) for m in router.messages} == {
                (GANG, EPOCH, rank, 10 + rank)
            }
            load = router.messages[-1].load
            assert load.weights_bytes_read == leader.last(rank, "loading").bytes_total
            assert load.tokens_exchanged > 0

        # Parked: the sums are right, and nobody burns CPU.
        await gang.idle()
        for rank in gang.ranks:
            computed = sum(len(ids) + count - 1 for (of, _), (ids, count) in asked.items() if of == rank)
            extra = len(asked[0, 0][0]) + asked[0, 0][1] - 1 if rank == 0 else 0
            assert leader.last(rank, "load").tokens_computed == computed + extra
        before, started = gang.cpu_seconds(), time.monotonic()
        await asyncio.sleep(2)
        elapsed = time.monotonic() - started
        for rank, seconds in gang.cpu_seconds().items():
            assert (seconds - before[rank]) / elapsed < 0.05, f"rank {rank} burns CPU while parked"

        # Small requests to random ranks, with pauses in which the gang parks or does not: nobody misses a wake.
        chance, numbers = random.Random(1), dict.fromkeys(gang.ranks, 100)
        for _ in range(60):
            rank = chance.choice(gang.ranks)
            numbers[rank] += 1
            routers[rank].submit(numbers[rank], prompt(numbers[rank], 3), chance.randint(1, 3))
            await asyncio.sleep(chance.choice([0, 0, 0.002, 0.01, 0.03]))
        for rank, router in routers.items():
            await router.all_finished(list(range(101, numbers[rank] + 1)))

        await gang.idle()
        gang.stop()
        assert await gang.exit_codes(5) == dict.fromkeys(gang.ranks, 0)
        assert not [failed for rank in gang.ranks for failed in leader.all_of(rank, "failed")]


async def test_a_gang_over_two_hosts(maverick: Written, exactness: Exactness) -> None:
    """No rendezvous store; rows within a host and between hosts are told apart."""
    hosts = ["127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.2"]
    async with start_gang(maverick.folder, 4, hosts=hosts) as gang:
        assert gang.store is None
        joined = [gang.leader.last(rank, "joined") for rank in gang.ranks]
        assert [each.host for each in joined] == hosts
        addresses = [each.exchange_address for each in joined] + [each.address for each in joined]
        assert [address.rpartition(":")[0] for address in addresses] == hosts * 2
        assert len(set(addresses)) == 8
        routers = {rank: Router(gang, rank) for rank in gang.ranks}
        asked = {rank: (prompt(rank, 10 + 30 * rank), 20) for rank in gang.ranks}
        for rank, router in routers.items():
            router.submit(0, *asked[rank])
        for rank, router in routers.items():
            await router.all_finished([0])
            exactness.check(maverick.reference, asked[rank][0], router.outputs[0], f"rank {rank} of two hosts")
        await gang.idle()
        for rank in gang.ranks:
            load = gang.leader.last(rank, "load")
            assert load.bytes_within_host > 0
            # Two ranks there, one here, and headers.
            assert load.bytes_between_hosts > load.bytes_within_host
        before, started = gang.cpu_seconds(), time.monotonic()
        await asyncio.sleep(1)
        for rank, seconds in gang.cpu_seconds().items():
            assert (seconds - before[rank]) / (time.monotonic() - started) < 0.05, f"rank {rank} burns CPU while parked"
        gang.stop()
        assert await gang.exit_codes(5) == dict.fromkeys(gang.ranks, 0)


async def test_a_host_that_dies_takes_the_others_exchange_down(maverick: Written) -> None:
    hosts = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    async with start_gang(maverick.folder, 3, hosts=hosts, lifeline_timeout_s=6.0) as gang:
        router = Router(gang, 0)
        router.submit(1, prompt(1, 30), ENDLESS)
        await router.wait("tokens", lambda: len(router.outputs[1]) > 3)
        os.kill(gang.processes[2].pid, signal.SIGKILL)
        leader = gang.leader
        await leader.wait("failures", lambda: all(leader.all_of(rank, "failed") for rank in (0, 1)))
        assert all("is gone" in leader.last(rank, "failed").message for rank in (0, 1))
        assert await gang.exit_codes(5) == {0: 1, 1: 1, 2: -signal.SIGKILL}


async def test_stop_ends_ranks_that_wait_for_others(maverick: Written) -> None:
    """Rank 1 never hears of the epoch, so the others wait for its connection."""
    async with start_gang(maverick.folder, 3, wait=False, hosts=["127.0.0.1", "127.0.0.2", "127.0.0.2"]) as gang:
        gang.processes[1].kill()
        gang.open_epoch()
        await gang.leader.wait(
            "a group to form",
            lambda: any(
                progress.stage == gang_pb2.Progress.STAGE_GROUP for progress in gang.leader.all_of(0, "progress")
            ),
        )
        gang.stop()
        codes = await gang.exit_codes(8)
        # Rank 2 connects to rank 1, and may have failed before it was told to stop.
        assert codes[0] == 0
        assert codes[2] in (0, 1)


async def test_abort_frees_blocks_within_a_step(maverick: Written) -> None:
    async with start_gang(maverick.folder, 2) as gang:
        router = Router(gang, 0)
        router.submit(1, prompt(1, 200), ENDLESS)
        router.submit(2, prompt(2, 10), ENDLESS)
        await router.wait("tokens", lambda: len(router.outputs[1]) > 5 and len(router.outputs[2]) > 5)
        usage = router.messages[-1].load.kv_usage_ratio
        router.abort(1)
        seen = len(router.messages)
        await router.wait("abort", lambda: router.messages[-1].load.running == 1, 5)
        after = router.messages[seen:]
        freed = next(number for number, message in enumerate(after) if message.load.running == 1)
        # From the step on that took the abort: no token, and only the other's blocks. Steps under way on the wire
        # before that are few.
        assert freed < 20
        assert all(output.sequence_id == 2 for message in after[freed:] for output in message.outputs)
        assert after[freed].load.kv_usage_ratio < usage / 2
        assert 1 not in router.finished
        # A finished or unknown one: nothing happens.
        router.abort(1)
        router.abort(99)
        count = len(router.outputs[2])
        await router.wait("more tokens", lambda: len(router.outputs[2]) > count + 5)
        router.abort(2)
        await gang.idle(5)


async def test_a_router_that_goes_leaves_no_work(maverick: Written) -> None:
    async with start_gang(maverick.folder, 2) as gang:
        leaving, staying = Router(gang, 1, "leaving"), Router(gang, 1, "staying")
        for number in range(3):
            leaving.submit(number, prompt(number, 30), ENDLESS)
        staying.submit(0, prompt(9, 30), ENDLESS)
        await leaving.wait("tokens", lambda: len(leaving.outputs[2]) > 3)
        await staying.wait("tokens", lambda: staying.messages and staying.messages[-1].load.running == 4)
        await leaving.close()
        await staying.wait("room", lambda: staying.messages[-1].load.running == 1, 5)
        await staying.close()
        await gang.idle(5)
        # The same router's name again, and the rank serves on.
        again = Router(gang, 1, "leaving")
        again.submit(0, prompt(0, 30), 5)
        await again.all_finished([0])


async def test_parked_time_is_exempt_from_timeouts(maverick: Written) -> None:
    async with start_gang(maverick.folder, 2, exchange_timeout_s=2.0) as gang:
        router = Router(gang, 0)
        for number in range(2):
            await asyncio.sleep(3)
            router.submit(number, prompt(number, 10), 5)
            await router.all_finished([number], 10)
        gang.stop()
        assert await gang.exit_codes(5) == {0: 0, 1: 0}


async def test_a_gang_of_one(maverick: Written, exactness: Exactness) -> None:
    async with start_gang(maverick.folder, 1) as gang:
        router = Router(gang, 0)
        router.submit(0, prompt(3, 60), 12)
        router.submit(1, [], 12)
        router.submit(2, [5], 12, epoch=EPOCH + 1)
        await router.all_finished([0, 1, 2])
        exactness.check(maverick.reference, prompt(3, 60), router.outputs[0], "a gang of one")
        assert router.finished[1].detail == "the prompt is empty"
        assert router.finished[2].detail == "submitted to epoch 2, but the gang is in epoch 1"
        gang.stop()
        assert await gang.exit_codes(5) == {0: 0}


async def test_stop_ends_ranks_in_mid_stream(maverick: Written) -> None:
    async with start_gang(maverick.folder, 3) as gang:
        routers = [Router(gang, rank) for rank in gang.ranks]
        for router in routers:
            router.submit(1, prompt(1, 30), ENDLESS)
        for router in routers:
            await router.wait("tokens", lambda router=router: len(router.outputs[1]) > 3)
        gang.stop()
        codes = await gang.exit_codes(5)
        assert None not in codes.values(), "a rank goes on after stop"


async def test_stop_before_the_first_epoch(maverick: Written) -> None:
    async with start_gang(maverick.folder, 2, wait=False) as gang:
        gang.stop()
        assert await gang.exit_codes(5) == {0: 0, 1: 0}


@pytest.mark.parametrize("busy", [False, True], ids=["parked", "busy"])
async def test_ranks_end_when_their_leader_is_gone(maverick: Written, busy: bool) -> None:
    async with start_gang(maverick.folder, 3) as gang:
        if busy:
            router = Router(gang, 0)
            router.submit(1, prompt(1, 30), ENDLESS)
            await router.wait("tokens", lambda: len(router.outputs[1]) > 3)
        await gang.leader.close()
        assert await gang.exit_codes(8) == dict.fromkeys(gang.ranks, 1)


async def test_a_leader_that_never_answers(maverick: Written) -> None:
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        config = RankConfig(
            GANG,
            0,
            1,
            f"{HOST}:{unused.getsockname()[1]}",
            HOST,
            1,
            engine_config(maverick.folder),
            lifeline_timeout_s=1.0,
        )
        process = context.Process(target=run_rank, args=(config,), daemon=True)
        process.start()
        try:
            await asyncio.to_thread(process.join, 15)
            assert process.exitcode == 1
        finally:
            process.kill()


async def test_ranks_whose_leader_says_nothing_of_a_lost_peer_fail(maverick: Written) -> None:
    async with start_gang(maverick.folder, 3, lifeline_timeout_s=6.0) as gang:
        router = Router(gang, 0)
        router.submit(1, prompt(1, 30), ENDLESS)
        await router.wait("tokens", lambda: len(router.outputs[1]) > 3)
        os.kill(gang.processes[2].pid, signal.SIGKILL)
        leader = gang.leader
        await leader.wait("failures", lambda: all(leader.all_of(rank, "failed") for rank in (0, 1)))
        for rank in (0, 1):
            failed = leader.last(rank, "failed")
            assert "exchange failed" in failed.message
            assert not failed.is_user_error
        await leader.wait("end of its lifeline", lambda: 2 in leader.lost, 5)
        assert await gang.exit_codes(5) == {0: 1, 1: 1, 2: -signal.SIGKILL}


async def test_a_bad_checkpoint_on_one_rank(maverick: Written, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(maverick.folder, bad)
    name = "model.layers.3.feed_forward.experts.gate_up_proj"
    edit_tensors(bad, lambda tensors: {**tensors, name: torch.zeros(127, 64, 64)})
    async with start_gang(maverick.folder, 4, wait=False, folders={2: bad}) as gang:
        gang.open_epoch()
        leader = gang.leader
        await leader.wait("failure", lambda: leader.all_of(2, "failed"))
        failed = leader.last(2, "failed")
        assert failed.is_user_error
        assert f"{bad / 'model.safetensors'}: tensor {name} has shape [127, 64, 64]" in failed.message
        # The others wait for it in vain; told to stop, they end.
        gang.stop()
        assert await gang.exit_codes(8) == {0: 0, 1: 0, 2: 2, 3: 0}


async def test_a_context_that_does_not_fit(maverick: Written) -> None:
    async with start_gang(maverick.folder, 2, wait=False, max_model_len=4000, kv_memory_bytes=2**18) as gang:
        gang.open_epoch()
        leader = gang.leader
        await leader.wait("failures", lambda: all(leader.all_of(rank, "failed") for rank in gang.ranks))
        for rank in gang.ranks:
            failed = leader.last(rank, "failed")
            assert failed.is_user_error
            assert failed.message.startswith("max_model_len: 4000 tokens do not fit the KV pools")
        assert await gang.exit_codes(5) == {0: 2, 1: 2}


async def test_an_address_that_is_not_this_hosts(maverick: Written) -> None:
    config = RankConfig(GANG, 1, 1, f"{HOST}:1", "203.0.113.7", 1, engine_config(maverick.folder))
    with pytest.raises(UserError, match=r"203\.0\.113\.7 is no address of this host"):
        await asyncio.wait_for(asyncio.to_thread(Rank(config).run), 15)
