"""Expert maps: covered, and of a gang of other members as like the one before as balance allows."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.expert_map import ExpertMap


@st.composite
def maps(draw: st.DrawFn, most_replicas: int = 1) -> ExpertMap:
    ranks = draw(st.lists(st.integers(0, 11), min_size=1, max_size=8, unique=True))
    num_experts = draw(st.integers(1, 24))
    replicas = st.lists(st.sampled_from(ranks), min_size=1, max_size=min(most_replicas, len(ranks)), unique=True)
    layer = st.lists(replicas.map(tuple), min_size=num_experts, max_size=num_experts).map(tuple)
    return ExpertMap(tuple(draw(st.lists(layer, min_size=1, max_size=3))))


members = st.lists(st.integers(0, 11), min_size=1, max_size=8, unique=True)


@given(maps(most_replicas=3), members)
def test_over_covers_with_the_ranks_that_there_are(before: ExpertMap, ranks: list[int]) -> None:
    after = before.over(ranks)
    after.check_coverage(ranks)
    assert set(after.ranks) <= set(ranks)
    assert [len(layer) for layer in after.replicas] == [len(layer) for layer in before.replicas]
    assert after.over(ranks) == after
    assert ExpertMap.from_proto(after.to_proto()) == after


@given(maps(), members)
def test_over_is_balanced_and_moves_as_little_as_that_takes(before: ExpertMap, ranks: list[int]) -> None:
    after = before.over(ranks)
    for layer, (old, new) in enumerate(zip(before.replicas, after.replicas, strict=True)):
        assert all(len(held) == 1 for held in new)
        counts = sorted(len(after.experts_of(layer, rank)) for rank in ranks)
        assert counts[-1] - counts[0] <= 1
        # What every rank had, most first; whoever has the most may keep one more than the others.
        had = Counter(held[0] for held in old if held[0] in ranks)
        kept_most = sorted((had[rank] for rank in ranks), reverse=True)
        least, extra = divmod(len(old), len(ranks))
        given_up = sum(max(0, count - least - (place < extra)) for place, count in enumerate(kept_most))
        lost = sum(held[0] not in ranks for held in old)
        gained = sum(new_held != old_held for old_held, new_held in zip(old, new, strict=True))
        assert gained == lost + given_up


@given(st.integers(1, 3), st.integers(1, 24), st.lists(st.integers(0, 11), min_size=2, max_size=8, unique=True))
def test_a_rank_that_goes_takes_nothing_from_the_others(layers: int, experts: int, ranks: list[int]) -> None:
    before = ExpertMap.even(layers, experts, ranks)
    after = before.over(ranks[1:])
    for layer in range(layers):
        for rank in ranks[1:]:
            assert set(after.experts_of(layer, rank)) >= set(before.experts_of(layer, rank))
    back = after.over(ranks)
    for layer in range(layers):
        gained = [expert for expert in range(experts) if ranks[0] in back.replicas[layer][expert]]
        assert [held for held in back.replicas[layer] if held[0] != ranks[0]] == [
            held for expert, held in enumerate(after.replicas[layer]) if expert not in gained
        ], "somebody else gained one"


def test_a_rank_without_experts_is_no_mistake() -> None:
    """More ranks than experts."""
    after = ExpertMap.even(1, 2, [0]).over([0, 1, 2])
    assert sorted(held for (held,) in after.replicas[0]) == [0, 1]
    with pytest.raises(ValueError, match="a map needs a rank"):
        after.over([])


def test_coverage_is_checked() -> None:
    expert_map = ExpertMap((((0,), (1, 2)), ((2,), (0,))))
    assert expert_map.ranks == [0, 1, 2]
    expert_map.check_coverage([0, 2])
    with pytest.raises(ValueError, match=r"MoE layer 1: expert 0 is on ranks \(2,\), none of which is a member"):
        expert_map.check_coverage([0, 1])
