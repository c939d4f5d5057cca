"""Where ranks and experts go: pure functions from counts and hosts to a plan."""

from collections import Counter
from collections.abc import Sequence

from workers.errors import UserError
from workers.expert_map import ExpertMap
from workers.model_config import ModelConfig


def check_ranks(model: ModelConfig, num_ranks: int) -> None:
    """A rank without an expert would only get in the others' way.

    Raises:
        UserError: fewer ranks than one, or more than the model has experts.
    """
    if num_ranks < 1:
        raise UserError(f"ranks: must be at least 1, got {num_ranks}")
    if model.num_moe_layers and num_ranks > model.num_experts:
        raise UserError(
            f"ranks: {num_ranks} are more than the model's {model.num_experts} experts a layer; "
            f"ask for {model.num_experts} or fewer"
        )


def first_expert_map(model: ModelConfig, ranks: Sequence[int]) -> ExpertMap:
    """The map a gang starts with: contiguous runs of experts, sizes differing by at most one (43, 43 and 42 for 128
    experts over 3 ranks), one entry a MoE layer.

    Raises:
        UserError: as `check_ranks`.
    """
    check_ranks(model, len(ranks))
    return ExpertMap.even(model.num_moe_layers, model.num_experts, ranks)


def ranks_on_same_host(hosts: Sequence[str]) -> tuple[int, ...]:
    """For each rank, given every rank's host: how many ranks share its host, itself included."""
    ranks_of = Counter(hosts)
    return tuple(ranks_of[host] for host in hosts)
