"""Where ranks and experts go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import first_expert_map, ranks_on_same_host
from workers.errors import UserError
from workers.model_config import ModelConfig


def model(experts: int, layers: int = 4, step: int = 2) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": "llama4_text",
            "num_hidden_layers": layers,
            "interleave_moe_layer_step": step,
            "num_local_experts": experts,
        }
    )


@given(experts=st.integers(1, 200), ranks=st.integers(1, 200))
def test_every_expert_has_one_rank_and_sizes_differ_by_one(experts: int, ranks: int) -> None:
    if ranks > experts:
        with pytest.raises(UserError, match=f"{ranks} are more than the model's {experts} experts"):
            first_expert_map(model(experts), range(ranks))
        return
    expert_map = first_expert_map(model(experts), range(ranks))
    assert len(expert_map.replicas) == 2
    held = [expert_map.experts_of(0, rank) for rank in range(ranks)]
    assert sorted(expert for run in held for expert in run) == list(range(experts))
    assert max(map(len, held)) - min(map(len, held)) <= 1
    assert all(run == list(range(run[0], run[0] + len(run))) for run in held)


def test_a_model_without_experts_takes_any_number_of_ranks() -> None:
    assert first_expert_map(model(16, layers=1, step=2), range(40)).replicas == ()


def test_no_ranks() -> None:
    with pytest.raises(UserError, match="at least 1"):
        first_expert_map(model(16), [])


def test_ranks_on_same_host() -> None:
    assert ranks_on_same_host(["a", "b", "a", "a"]) == (3, 1, 3, 3)
