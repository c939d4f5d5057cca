"""The leader with fake ranks: forming a gang, deciding deaths, starting over, giving up, stopping."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from cluster.default_model import default_model_dir
from cluster.leader import Leader
from cluster.leader_config import LeaderConfig
from cluster.placement import NoRoomError
from protos import gang_pb2, gang_pb2_grpc
from tests.unit.cluster.fake_gang import FakeLauncher, FakeRank, FakeStore
from tests.unit.cluster.fake_hosts import LocalHost
from workers.config import EngineConfig, RankConfig
from workers.errors import UserError
from workers.model_config import ModelConfig

MODEL = ModelConfig.from_dict(
    {"model_type": "llama4_text", "num_hidden_layers": 4, "interleave_moe_layer_step": 2, "num_local_experts": 128}
)
QUICK = LeaderConfig(
    join_timeout_s=5,
    load_stall_timeout_s=5,
    restart_delay_s=0.01,
    stop_timeout_s=0.5,
    restarts=2,
    restart_window_s=60,
    # Fake ranks report nothing unless a test has them do it.
    rank_silence_s=60,
)


class Gang:
    def __init__(self, launcher: FakeLauncher, num_ranks: int, config: LeaderConfig) -> None:
        self.launcher = launcher
        self.stores: list[FakeStore] = []
        self.leader = Leader(
            "g1", "127.0.0.1", num_ranks, MODEL, EngineConfig(Path("/model")), config, launcher, self.open_store
        )

    def open_store(self, host: str) -> FakeStore:
        self.stores.append(FakeStore(f"{host}:{9000 + len(self.stores)}"))
        return self.stores[-1]

    async def until(self, state: str, epoch: int = 0) -> gang_pb2.GangView:
        """Watch over gRPC, as a router would."""
        async with asyncio.timeout(10), grpc.aio.insecure_channel(self.leader.address) as channel:
            async for view in gang_pb2_grpc.LeaderStub(channel).Watch(gang_pb2.WatchRequest(router_id="r")):
                if view.state == state and view.epoch >= epoch:
                    return view
        raise AssertionError("the watch ended")


@asynccontextmanager
async def gang(launcher: FakeLauncher | None = None, num_ranks: int = 4, config: LeaderConfig = QUICK):
    made = Gang(launcher or FakeLauncher(), num_ranks, config)
    await made.leader.start()
    try:
        yield made
    finally:
        await made.leader.stop("test is over")


async def test_forms_a_gang():
    async with gang() as made:
        view = await made.until("ready")
        assert (view.gang_id, view.epoch, view.dtype) == ("g1", 1, "float32")
        assert view.max_model_len == 997, "the least of any rank"
        assert [(r.rank, r.incarnation, r.pid, r.state, r.experts) for r in view.ranks] == [
            (rank, 1, 1000 + rank, "ready", 32) for rank in range(4)
        ]
        epoch = made.launcher.ranks[2, 1].epoch
        assert epoch.store_address == made.stores[0].address
        assert [member.address for member in epoch.members] == [f"127.0.0.1:{5000 + rank}" for rank in range(4)]
        assert len(epoch.layers) == 2
        assert all(len(layer.experts) == 128 for layer in epoch.layers)
        assert made.launcher.launched[0].ranks_on_host == 4


async def test_any_number_of_ranks_holds_every_expert():
    async with gang(num_ranks=3) as made:
        view = await made.until("ready")
        assert [rank.experts for rank in view.ranks] == [43, 43, 42]


async def test_ranks_on_several_hosts_share_only_their_own():
    launcher = FakeLauncher(hosts=("127.0.0.1", "127.0.0.1", "127.0.0.2"))
    async with gang(launcher, num_ranks=3) as made:
        await made.until("ready")
        assert [(c.host, c.ranks_on_host) for c in launcher.launched] == [
            ("127.0.0.1", 2),
            ("127.0.0.1", 2),
            ("127.0.0.2", 1),
        ]


async def test_more_ranks_than_experts():
    made = Gang(FakeLauncher(), 129, QUICK)
    with pytest.raises(UserError, match="129 are more than the model's 128 experts"):
        await made.leader.start()


@pytest.mark.parametrize("death", ["crash", "told", "stuck"])
async def test_a_lost_rank_is_left_out_and_comes_back(death: str):
    config = replace(QUICK, restart_delay_s=0.3, rank_silence_s=0.6)
    async with gang(config=config) as made:
        await made.until("ready")
        launcher = made.launcher
        if death == "crash":
            launcher.crash(2, 1)
        elif death == "told":
            launcher.ranks[2, 1].fail("a kernel failed")
        keep_reporting(launcher, silent=[(2, 1)] if death == "stuck" else [])
        view = await made.until("ready", epoch=2)
        assert view.epoch == 2
        assert [(rank.rank, rank.incarnation) for rank in view.ranks] == [(0, 1), (1, 1), (3, 1)]
        assert view.detail == "without rank 2"
        assert launcher.killed == [(2, 1)], "it alone is fenced"
        while (epoch := launcher.ranks[0, 1].epoch).epoch < 2:
            await asyncio.sleep(0.02)
        assert [member.rank for member in epoch.members] == [0, 1, 3]
        assert all(set(experts.ranks) <= {0, 1, 3} for layer in epoch.layers for experts in layer.experts)
        assert all(store.closed for store in made.stores[:-1])
        keep_reporting(launcher)
        view = await made.until("ready", epoch=3)
        assert [(rank.rank, rank.incarnation) for rank in view.ranks] == [(0, 1), (1, 1), (2, 3), (3, 1)]
        assert view.detail == ""
        assert sum(rank.experts for rank in view.ranks) == 128
        held = {e for e, x in enumerate(launcher.ranks[2, 3].prepared.layers[0].experts) if 2 in x.ranks}
        assert len(held) == 32, "it has loaded what it now serves"
        assert sorted(launcher.alive) == [(0, 1), (1, 1), (2, 3), (3, 1)]


def keep_reporting(launcher: FakeLauncher, silent: Sequence[tuple[int, int]] = ()) -> None:
    """As real ranks do, from now on."""

    async def report(rank: FakeRank) -> None:
        while True:
            rank.reports.put_nowait(gang_pb2.RankReport(load=gang_pb2.RankLoad()))
            await asyncio.sleep(0.2)

    for key, rank in launcher.ranks.items():
        if key not in silent and not hasattr(rank, "reporting"):
            rank.reporting = asyncio.create_task(report(rank))


async def test_two_deaths_at_once_are_one_reshape():
    async with gang(num_ranks=5, config=replace(QUICK, restart_delay_s=30)) as made:
        await made.until("ready")
        made.launcher.crash(1, 1)
        made.launcher.crash(4, 1)
        while (view := await made.until("ready", epoch=2)).detail != "without rank 1, 4":
            await asyncio.sleep(0.02)
        assert [rank.rank for rank in view.ranks] == [0, 2, 3]
        assert view.epoch <= 3


async def test_a_death_during_a_reshape_begins_the_next():
    launcher = FakeLauncher({(0, 1): "enters no second epoch"})
    async with gang(launcher, config=replace(QUICK, restart_delay_s=30, reshape_timeout_s=30)) as made:
        await made.until("ready")
        launcher.crash(2, 1)
        while launcher.ranks[0, 1].epoch.epoch != 2:
            await asyncio.sleep(0.02)
        launcher.crash(0, 1)
        view = await made.until("ready", epoch=3)
        assert [rank.rank for rank in view.ranks] == [1, 3]


async def test_who_does_not_enter_the_epoch_is_lost():
    launcher = FakeLauncher({(0, 1): "enters no second epoch"})
    async with gang(launcher, config=replace(QUICK, restart_delay_s=30, reshape_timeout_s=0.5)) as made:
        await made.until("ready")
        launcher.crash(2, 1)
        view = await made.until("ready", epoch=3)
        assert [rank.rank for rank in view.ranks] == [1, 3]
        assert (0, 1) in launcher.killed


async def test_a_rank_that_never_comes_back_is_done_without():
    config = replace(QUICK, restart_delay_s=0.01, load_stall_timeout_s=0.3, restarts=2)
    launcher = FakeLauncher({(2, incarnation): "never prepared" for incarnation in range(2, 20)})
    async with gang(launcher, config=config) as made:
        await made.until("ready")
        launcher.crash(2, 1)
        await made.until("ready", epoch=2)
        await asyncio.sleep(1.5)
        assert [(config.rank, config.incarnation) for config in launcher.launched[4:]] == [(2, 3), (2, 4)]
        view = await made.until("ready", epoch=2)
        assert (view.epoch, [rank.rank for rank in view.ranks]) == (2, [0, 1, 3])
        assert sorted(launcher.alive) == [(0, 1), (1, 1), (3, 1)]


async def test_below_the_fewest_the_gang_starts_over():
    launcher = FakeLauncher()
    async with gang(launcher, config=replace(QUICK, fewest_ranks=4)) as made:
        await made.until("ready")
        launcher.crash(2, 1)
        starting = await made.until("starting", epoch=1)
        assert "rank 2" in starting.detail
        view = await made.until("ready", epoch=2)
        assert [rank.incarnation for rank in view.ranks] == [2, 2, 2, 2]
        assert {(rank, 1) for rank in range(4)} <= set(launcher.killed), "fenced before the next epoch"


async def test_a_user_error_is_final():
    launcher = FakeLauncher({(1, 1): "bad checkpoint"})
    async with gang(launcher) as made:
        view = await made.until("failed")
        assert view.is_user_error
        assert view.detail == "rank 1: model.safetensors: tensor lm_head.weight is missing"
        assert len(launcher.launched) == 4, "not started again"
        assert launcher.alive == []


async def test_gives_up_after_bounded_restarts():
    launcher = FakeLauncher()
    async with gang(launcher, config=replace(QUICK, fewest_ranks=4)) as made:
        for epoch in (1, 2, 3):
            await made.until("ready", epoch=epoch)
            launcher.crash(0, epoch)
        view = await made.until("failed")
        assert not view.is_user_error
        assert "rank 0" in view.detail
        assert launcher.alive == []


@pytest.mark.parametrize(
    ("behaviour", "sentence"), [("never joins", "joined the gang"), ("never ready", "loaded its weights")]
)
async def test_stages_are_bounded_and_name_the_rank(behaviour: str, sentence: str):
    config = LeaderConfig(join_timeout_s=0.6, load_stall_timeout_s=0.6, restarts=0, stop_timeout_s=0.1)
    launcher = FakeLauncher({(3, 1): behaviour})
    async with gang(launcher, config=config) as made:
        view = await made.until("failed")
        assert view.detail == f"rank 3 has not {sentence} within 0.6 s"
        assert launcher.alive == []


@pytest.mark.parametrize("what", ["bytes_read", "bytes_packed"])
async def test_bytes_extend_the_bound(what: str):
    config = LeaderConfig(load_stall_timeout_s=0.6, restarts=0, stop_timeout_s=0.1)
    launcher = FakeLauncher({(3, 1): "never ready"})
    async with gang(launcher, config=config) as made:
        started = time.monotonic()
        while (3, 1) not in launcher.ranks or launcher.ranks[3, 1].epoch is None:
            await asyncio.sleep(0.02)
        slow = launcher.ranks[3, 1]
        for read in range(4):
            await asyncio.sleep(0.4)
            slow.reports.put_nowait(gang_pb2.RankReport(loading=gang_pb2.Loading(**{what: 100 + read})))
        assert made.leader.membership.state == "starting"
        await made.until("failed")
        assert time.monotonic() - started > 2


async def test_no_room_is_an_error_with_a_reason_and_final():
    launcher = FakeLauncher(place_error=NoRoomError("the cluster has room for 2 of 4 ranks"))
    async with gang(launcher, config=replace(QUICK, restarts=3, restart_delay_s=30)) as made:
        view = await made.until("failed")
        assert view.detail == "the cluster has room for 2 of 4 ranks"
        assert not view.is_user_error


async def test_stages_follow_each_other():
    launcher = FakeLauncher({(1, 1): "stays at weights"})
    async with gang(launcher, num_ranks=2) as made:
        while (view := await made.until("starting")).stage != "weights loaded":
            await asyncio.sleep(0.02)
        waiting = launcher.ranks[1, 1]
        for stage, seen in ((2, "group formed"), (3, "first exchange")):
            waiting.reports.put_nowait(gang_pb2.RankReport(progress=gang_pb2.Progress(epoch=1, stage=stage)))
            while (view := await made.until("starting")).stage != seen:
                await asyncio.sleep(0.02)
        old = gang_pb2.EpochReady(epoch=0, max_model_len=9, dtype="float32")
        waiting.reports.put_nowait(gang_pb2.RankReport(epoch_ready=old))
        new = gang_pb2.EpochReady(epoch=1, max_model_len=990, dtype="float32")
        waiting.reports.put_nowait(gang_pb2.RankReport(epoch_ready=new))
        view = await made.until("ready")
        assert (view.stage, view.max_model_len) == ("", 990)


@pytest.mark.parametrize(
    ("stage", "bound", "sentence"),
    [
        (2, "group_timeout_s", "connected with the other ranks"),
        (3, "first_exchange_timeout_s", "done its first exchange"),
    ],
)
async def test_a_stage_that_does_not_end_names_rank_and_host(stage: int, bound: str, sentence: str, tmp_path: Path):
    hosts = [LocalHost(tmp_path, number) for number in (1, 2)]
    launcher = FakeLauncher({(1, 1): "stays at weights"}, hosts=("127.0.0.1", "127.0.0.2"), agents=hosts)
    async with gang(launcher, num_ranks=2, config=replace(QUICK, restarts=0, **{bound: 0.5})) as made:
        while (1, 1) not in launcher.ranks or launcher.ranks[1, 1].epoch is None:
            await asyncio.sleep(0.02)
        report = gang_pb2.Progress(epoch=1, stage=stage)
        launcher.ranks[1, 1].reports.put_nowait(gang_pb2.RankReport(progress=report))
        view = await made.until("failed")
        assert view.detail == f"rank 1 on host 127.0.0.2 (h2) has not {sentence} within 0.5 s"
    for host in hosts:
        host.work.close()


async def test_a_silent_host_is_the_death_of_its_ranks(tmp_path: Path):
    hosts = [LocalHost(tmp_path, number) for number in (1, 2)]
    launcher = FakeLauncher(hosts=("127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.2"), agents=hosts)
    async with gang(launcher, config=replace(QUICK, restarts=0, host_silence_s=1.0)) as made:
        view = await made.until("ready")
        assert [(host.hostname, list(host.ranks)) for host in view.hosts] == [("h1", [0, 1]), ("h2", [2, 3])]
        assert launcher.launched[2].engine.model_dir == default_model_dir(), "where it lies on that host"
        keep_reporting(launcher)
        hosts[1].work.close()
        view = await made.until("ready", epoch=2)
        assert [rank.rank for rank in view.ranks] == [0, 1]
        assert launcher.shunned == ["127.0.0.2"]
    hosts[0].work.close()


async def test_an_old_incarnation_is_refused():
    async with gang() as made:
        await made.until("ready")
        config = RankConfig("g1", 0, 0, made.leader.address, "127.0.0.1", 1, EngineConfig(Path("/model")))
        late = FakeRank(config)
        await asyncio.wait_for(late.run(), 5)
        assert late.status == grpc.StatusCode.FAILED_PRECONDITION
        twin = FakeRank(made.launcher.launched[0])
        await asyncio.wait_for(twin.run(), 5)
        assert twin.status == grpc.StatusCode.ALREADY_EXISTS
        assert made.leader.membership.state == "ready"


async def test_loads_reach_the_view():
    async with gang() as made:
        await made.until("ready")
        load = gang_pb2.RankLoad(running=3, waiting=1, tokens_computed=77)
        made.launcher.ranks[1, 1].reports.put_nowait(gang_pb2.RankReport(load=load))
        while (view := await made.until("ready")).ranks[1].load.tokens_computed != 77:
            await asyncio.sleep(0.02)
        assert view.ranks[1].load.running == 3


async def test_stop_asks_and_then_kills():
    launcher = FakeLauncher({(1, 1): "never joins"})
    made = Gang(launcher, 2, QUICK)
    await made.leader.start()
    while made.leader.membership.lacking(lambda member: member.joined is not None) != [1]:
        await asyncio.sleep(0.01)
    started = time.monotonic()
    await made.leader.stop("shutting down")
    assert time.monotonic() - started < 2
    assert launcher.ranks[0, 1].stop_reason == "shutting down"
    assert launcher.alive == []


def test_bounds_are_checked():
    with pytest.raises(UserError, match="join_timeout_s"):
        LeaderConfig(join_timeout_s=0)
