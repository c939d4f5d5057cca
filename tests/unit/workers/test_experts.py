"""Which rank computes which expert, and that it computes what it should."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protos import gang_pb2
from tests.exactness import Written
from tests.local_engine import LocalRank, engine_config, greedy, prompt
from workers.exchange import Dispatched, LocalExchange
from workers.expert_map import ExpertMap
from workers.experts import MoeLayer, Placement, RoutedExperts
from workers.weights import ExpertWeights, MlpWeights, MoeWeights

CPU = torch.device("cpu")


@st.composite
def maps(draw: st.DrawFn, ranks: int = 5) -> ExpertMap:
    """Any expert on any rank, replicas at random, another map for each layer."""
    experts = draw(st.integers(1, 12))
    replicas = st.lists(st.integers(0, ranks - 1), min_size=1, max_size=ranks, unique=True).map(tuple)
    layer = st.lists(replicas, min_size=experts, max_size=experts).map(tuple)
    return ExpertMap(tuple(draw(st.lists(layer, min_size=1, max_size=4))))


@pytest.mark.parametrize(
    ("experts", "ranks", "sizes"),
    [(128, 4, [32] * 4), (128, 3, [43, 43, 42]), (16, 16, [1] * 16), (7, 2, [4, 3]), (5, 1, [5])],
)
def test_even_maps(experts: int, ranks: int, sizes: list[int]) -> None:
    names = [10 * rank + 3 for rank in range(ranks)]
    expert_map = ExpertMap.even(2, experts, names)
    for layer in range(2):
        held = [expert_map.experts_of(layer, rank) for rank in names]
        assert [expert for run in held for expert in run] == list(range(experts))
        assert sorted(map(len, held), reverse=True) == sizes
    assert [expert_map.most_experts(rank) for rank in names] == [len(run) for run in held]
    assert expert_map.experts_of(0, 999) == []


@given(expert_map=maps())
def test_maps_travel_unchanged(expert_map: ExpertMap) -> None:
    epoch = gang_pb2.Epoch(layers=expert_map.to_proto())
    assert ExpertMap.from_proto(gang_pb2.Epoch.FromString(epoch.SerializeToString()).layers) == expert_map


@pytest.mark.parametrize(
    ("replicas", "sentence"),
    [
        ((((0,), ()),), "MoE layer 0: expert 1 has no replica"),
        ((((0,), (1,)), ((0,), (1, 2, 1))), "MoE layer 1: expert 1 names a rank twice"),
        ((((0,), (1,)), ((0,),)), "MoE layer 1 maps 1 experts, layer 0 2"),
    ],
)
def test_maps_without_coverage_are_refused(replicas: tuple[tuple[tuple[int, ...], ...], ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ExpertMap(replicas)


@given(expert_map=maps(), data=st.data())
def test_rows_go_to_ranks_that_hold_their_expert(expert_map: ExpertMap, data: st.DataObject) -> None:
    members = data.draw(st.permutations(range(5)))
    layer = data.draw(st.integers(0, len(expert_map.replicas) - 1))
    num_experts = len(expert_map.replicas[layer])
    experts = data.draw(st.lists(st.integers(0, num_experts - 1), max_size=40))
    placement = Placement(expert_map, layer, members, CPU)
    process_R = placement.process_of(torch.tensor(experts, dtype=torch.int64), start=data.draw(st.integers(0, 9)))
    assert process_R.shape == (len(experts),)
    for expert, process in zip(experts, process_R.tolist(), strict=True):
        assert members[process] in expert_map.replicas[layer][expert]


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_replicas_take_rows_in_turn(replicas: int, start: int) -> None:
    expert_map = ExpertMap(((tuple(range(replicas)), (4,)),))
    placement = Placement(expert_map, 0, [0, 1, 2, 3, 4], CPU)
    process_R = placement.process_of(torch.zeros(30, dtype=torch.int64), start)
    counts = Counter(process_R.tolist())
    assert set(counts) == set(range(replicas))
    assert max(counts.values()) - min(counts.values()) <= 1
    # Processes that have one row each do not all send it to the same replica.
    first = {int(placement.process_of(torch.zeros(1, dtype=torch.int64), index)[0]) for index in range(5)}
    assert len(first) == replicas


def test_replicas_on_ranks_that_are_no_members_are_passed_over() -> None:
    placement = Placement(ExpertMap((((7, 9), (9, 8)),)), 0, [9, 8], CPU)
    process_R = placement.process_of(torch.tensor([0, 0, 1, 1]), start=0)
    assert process_R.tolist() == [0, 0, 0, 1]


def routed(experts: list[int], num_experts: int = 6) -> tuple[RoutedExperts, ExpertWeights]:
    generator = torch.Generator().manual_seed(0)
    weights = ExpertWeights(
        experts,
        list(range(len(experts))),
        torch.randn(len(experts), 2 * 5, 8, generator=generator),
        torch.randn(len(experts), 8, 5, generator=generator),
    )
    return RoutedExperts(weights, num_experts), weights


@given(rows=st.lists(st.sampled_from([1, 3, 4]), max_size=25))
def test_each_row_through_its_expert(rows: list[int]) -> None:
    layer, weights = routed([1, 3, 4])
    x_SD = torch.randn(len(rows), 8, generator=torch.Generator().manual_seed(1))
    y_SD = layer(x_SD, torch.tensor(rows, dtype=torch.int64))
    for x_D, y_D, expert in zip(x_SD, y_SD, rows, strict=True):
        slot = weights.experts.index(expert)
        gate, up = (weights.gate_up[slot] @ x_D).chunk(2)
        torch.testing.assert_close(y_D, weights.down[slot] @ (torch.nn.functional.silu(gate) * up))
    assert layer.tokens_E.tolist() == [rows.count(expert) for expert in range(6)]


def test_experts_that_are_not_here_are_refused() -> None:
    layer, _ = routed([1, 3, 4])
    with pytest.raises(RuntimeError, match=r"rows arrived for experts \[0, 5\], which this rank does not hold"):
        layer(torch.ones(5, 8), torch.tensor([1, 5, 0, 5, 3]))
    assert layer.tokens_E.sum() == 0
    empty, _ = routed([])
    assert empty(torch.ones(0, 8), torch.ones(0, dtype=torch.int64)).shape == (0, 8)
    with pytest.raises(RuntimeError, match="does not hold"):
        empty(torch.ones(1, 8), torch.tensor([0]))


class Listening(LocalExchange):
    """Hears where a process of the given index sends its rows."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.sent: list[int] = []

    def dispatch(self, x_RD: torch.Tensor, process_R: torch.Tensor, expert_R: torch.Tensor) -> Dispatched:
        self.sent += process_R.tolist()
        return super().dispatch(x_RD, process_R, expert_R)


def test_processes_begin_at_different_replicas() -> None:
    """When each decodes a single token for the same expert, they do not all send it to the same rank."""
    _, experts = routed([0])
    shared = MlpWeights(torch.randn(10, 8), torch.randn(8, 5))
    placement = Placement(ExpertMap((((0, 1, 2),),)), 0, [0, 1, 2], CPU)
    sent = []
    for index in range(3):
        exchange = Listening(index)
        MoeLayer(MoeWeights(torch.randn(1, 8), shared, experts), placement, exchange, 1)(torch.ones(1, 8))
        sent += exchange.sent
    assert sorted(sent) == [0, 1, 2]


def test_tokens_are_counted_by_expert(maverick: Written) -> None:
    rank = LocalRank(engine_config(maverick.folder))
    rank.generate([greedy(n, prompt(n, 20), 5) for n in range(3)])
    *most, last = rank.runner.model.moe_layers
    for layer in most:
        # 20 prompt tokens and 4 of the 5 drawn ones of each.
        assert int(layer.routed.tokens_E.sum()) == 3 * 24
    # The last layer computes only the rows that a token is drawn from.
    assert int(last.routed.tokens_E.sum()) == 3 * 5
