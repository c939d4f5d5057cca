"""Another epoch in one rank's process: weights, KV memory and sequences stay, and counters only grow."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from tests.checkpoints import MAVERICK, write
from tests.exactness import Written
from tests.local_engine import LocalRank, engine_config, greedy, prompt
from tests.unit.workers.test_engine import BreakingExchange, seeded
from tests.unit.workers.test_packed_weights import assert_same
from workers.config import EngineConfig
from workers.errors import ExchangeError
from workers.exchange import Exchange, LocalExchange
from workers.expert_map import ExpertMap
from workers.inbox import Add
from workers.metrics import RankMetrics
from workers.model_config import ModelConfig
from workers.packed_loading import LoadProgress, RankWeights
from workers.step_clock import StepClock

SMALL = {**MAVERICK, "num_local_experts": 8, "num_hidden_layers": 4}
CPU = torch.device("cpu")


def reshape(rank: LocalRank, epoch: int, exchange: Exchange, expert_map: ExpertMap | None = None) -> None:
    """As RankEngine does, with the same weights."""
    expert_map = expert_map or rank.map
    weights = rank.runner.model._weights
    rank.runner.reshape(weights, expert_map, rank.members, exchange)
    counts = [layer.routed.tokens_E for layer in rank.runner.model.moe_layers]
    rank.metrics.enter(epoch, exchange, dict(zip(rank.model.moe_layers, counts, strict=True)))
    rank.engine.enter(epoch, exchange)


# ---- weights -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "model"
    write(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


layers = st.lists(st.sampled_from([(0,), (1,), (0, 1)]), min_size=8, max_size=8).map(tuple)
expert_maps = st.builds(ExpertMap, st.tuples(layers, layers))


@pytest.mark.parametrize("is_shared", [True, False], ids=["mapped", "own"])
@given(taken=st.lists(expert_maps, min_size=2, max_size=4))
@settings(max_examples=15, deadline=None)
def test_weights_of_one_map_after_another_are_those_of_a_fresh_start(
    folder: Path, cache: Path, is_shared: bool, taken: list[ExpertMap]
) -> None:
    engine = EngineConfig(folder, weights_cache_dir=cache, share_weights=is_shared)
    model = ModelConfig.from_folder(folder)
    reports: list[LoadProgress] = []
    weights = RankWeights(engine, model, 0, torch.float32, CPU, reports.append)
    weights.take(taken[0])
    count = len(reports)
    for expert_map in taken[1:]:
        got = weights.take(expert_map)
        assert_same(got, RankWeights(engine, model, 0, torch.float32, CPU).take(expert_map))
    assert len(reports) == count, "only the first loading is reported"


def test_own_weights_stay_where_they_lie(folder: Path) -> None:
    """The places of lost experts are used again; memory grows only where there are too few."""
    engine, model = EngineConfig(folder, share_weights=False), ModelConfig.from_folder(folder)
    weights = RankWeights(engine, model, 0, torch.float32, CPU)

    def take(*held: int) -> Any:
        layer = tuple((0,) if expert in held else (1,) for expert in range(8))
        return weights.take(ExpertMap((layer,) * 2)).layers[1].mlp.routed

    first = take(0, 1, 2, 3)
    second = take(1, 2, 3, 7)
    assert second.gate_up.data_ptr() == first.gate_up.data_ptr()
    assert (second.experts, second.slots) == ([1, 2, 3, 7], [1, 2, 3, 0])
    third = take(2)
    assert (third.experts, third.slots, len(third.down)) == ([2], [2], 4)
    fourth = take(0, 1, 2, 3, 4)
    assert fourth.slots[2] == 2 and sorted(fourth.slots) == [0, 1, 2, 3, 4]


def test_a_model_that_lost_experts_and_got_them_back_computes_the_same(maverick: Written, tmp_path: Path) -> None:
    config = engine_config(maverick.folder, weights_cache_dir=tmp_path)
    model = ModelConfig.from_folder(maverick.folder)
    weights = RankWeights(config, model, 0, torch.float32, CPU)
    whole = ExpertMap.even(model.num_moe_layers, model.num_experts, [0])
    weights.take(whole.over([0, 1]))
    rank = LocalRank(config, whole, weights=weights.take(whole))
    (output,) = rank.generate([greedy(1, prompt(1, 30), 12)])
    assert output == LocalRank(config).generate([greedy(1, prompt(1, 30), 12)])[0]


# ---- steps -------------------------------------------------------------------------------------------------------


def finish(rank: LocalRank) -> None:
    while rank.engine.step():
        pass
    rank.scheduler.check_integrity()


def test_the_kv_memory_stays(maverick: Written) -> None:
    rank = LocalRank(engine_config(maverick.folder))
    sequences = [greedy(number, prompt(number, 30 + number), 20) for number in range(3)]
    for sequence in sequences:
        rank.inbox.put(Add(sequence))
    epoch = 1
    while rank.engine.step():
        epoch += 1
        # Every expert has a second replica, on a rank that is no member.
        twice = ExpertMap(tuple(tuple((0, 1)[:: 1 - epoch % 2 * 2] for _ in experts) for experts in rank.map.replicas))
        reshape(rank, epoch, LocalExchange(), twice)
    rank.scheduler.check_integrity()
    tokens = sum(sequence.num_computed_tokens for sequence in sequences)
    assert rank.engine.load.tokens_computed == tokens, "something was computed twice"
    fresh = LocalRank(engine_config(maverick.folder))
    assert [sequence.output_ids for sequence in sequences] == fresh.generate(
        greedy(number, prompt(number, 30 + number), 20) for number in range(3)
    )


def test_draws_are_those_of_an_undisturbed_run_wherever_a_step_breaks(maverick: Written) -> None:
    """Of every kind of sampling; every step breaks once, in one MoE layer or another."""
    undisturbed = LocalRank(engine_config(maverick.folder, max_num_batched_tokens=40))
    want = undisturbed.generate(seeded(number) for number in range(6))
    rank = LocalRank(engine_config(maverick.folder, max_num_batched_tokens=40))
    sequences = [seeded(number) for number in range(6)]
    for sequence in sequences:
        rank.scheduler.add(sequence)
    epoch = broken = 0
    while rank.scheduler.num_running or rank.scheduler.num_waiting:
        epoch += 2
        emitted = len(rank.emitted)
        reshape(rank, epoch, BreakingExchange(at=1 + broken % 4))
        with pytest.raises(ExchangeError):
            rank.engine.step()
        assert len(rank.emitted) == emitted
        broken += 1
        reshape(rank, epoch + 1, LocalExchange())
        assert rank.engine.step()
    assert broken > 10
    assert [sequence.output_ids for sequence in sequences] == want
    rank.scheduler.check_integrity()
    assert rank.runner.blocks.usage_ratio == 0
    assert rank.scheduler.prefix_hit_tokens <= rank.scheduler.prefix_lookup_tokens


def test_steps_are_counted_anew_and_totals_go_on(maverick: Written) -> None:
    rank = LocalRank(engine_config(maverick.folder))
    rank.exchange.rows_sent, rank.exchange.bytes_within_host, rank.exchange.bytes_between_hosts = 5, 100, 30
    rank.inbox.put(Add(greedy(1, prompt(1, 10), 3)))
    finish(rank)
    assert [step for step, _ in rank.emitted] == [1, 2, 3]
    before = rank.engine.load
    exchange = LocalExchange()
    exchange.rows_sent, exchange.bytes_within_host = 2, 40
    reshape(rank, 2, exchange)
    load = rank.engine.load
    assert (load.tokens_exchanged, load.bytes_within_host, load.bytes_between_hosts) == (7, 140, 30)
    assert load.tokens_computed == before.tokens_computed == 12
    rank.inbox.put(Add(greedy(2, prompt(2, 10), 2)))
    finish(rank)
    assert [step for step, _ in rank.emitted] == [1, 2, 3, 1, 2]
    assert rank.engine.load.tokens_computed == 23


# ---- metrics -----------------------------------------------------------------------------------------------------


def value(name: str, gang: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, {"gang": gang, "rank": "0", **labels}) or 0.0


def test_counters_of_the_exchange_and_of_experts_go_on_from_epoch_to_epoch() -> None:
    gang, first, second = "counters", LocalExchange(), LocalExchange()
    old, new = torch.tensor([3, 0]), torch.tensor([0, 4])
    metrics = RankMetrics(gang, 0, 1, first, StepClock(), {1: torch.zeros(2, dtype=torch.int64)})
    metrics.enter(1, first, {1: old})
    first.seconds, first.bytes_within_host = 2.0, 50
    # Nothing was flushed of the first epoch when the second begins.
    second.seconds, second.bytes_within_host = 0.5, 7
    metrics.enter(2, second, {1: new})
    metrics.flush()
    metrics.flush()
    assert value("caravan_exchange_seconds_total", gang) == 2.5
    assert value("caravan_exchange_bytes_total", gang, direction="sent", scope="within_host") == 57
    assert value("caravan_expert_tokens_total", gang, layer="1", expert="0") == 3
    assert value("caravan_expert_tokens_total", gang, layer="1", expert="1") == 4
    assert value("caravan_epoch", gang) == 2
