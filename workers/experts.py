"""The mixture of experts: the expert router, dispatch to the ranks that hold the experts, combine.

Shape suffixes: T tokens, R rows (a token once an expert it chose), S received rows, D hidden size, E logical experts.
"""

import torch
from torch import Tensor

from workers.exchange import Exchange
from workers.expert_map import ExpertMap
from workers.layers import mlp, swiglu
from workers.step_clock import StepClock
from workers.weights import ExpertWeights, MoeWeights


class Placement:
    """One MoE layer's expert map as tensors: which process holds which replica of which expert.

    Args:
        members: ranks in process-group order.
    """

    def __init__(self, expert_map: ExpertMap, layer: int, members: list[int], device: torch.device) -> None:
        process = {rank: index for index, rank in enumerate(members)}
        replicas = [[process[rank] for rank in ranks if rank in process] for ranks in expert_map.replicas[layer]]
        most = max(len(processes) for processes in replicas)
        self._count_E = torch.tensor([len(processes) for processes in replicas], device=device)
        # Short rows repeat their first entry; the modulus never reaches the repeats.
        padded = [processes + [processes[0]] * (most - len(processes)) for processes in replicas]
        self._process_EK = torch.tensor(padded, device=device)
        self._is_replicated = most > 1

    def process_of(self, expert_R: Tensor, start: int) -> Tensor:
        """Process each row goes to: the replicas of an expert take its rows in turn, beginning with number `start`."""
        if not self._is_replicated:
            return self._process_EK[expert_R, 0]
        turn_R = torch.arange(start, start + len(expert_R), device=expert_R.device) % self._count_E[expert_R]
        return self._process_EK[expert_R, turn_R]


class RoutedExperts:
    """The experts of one MoE layer that this rank holds. `tokens_E` counts the rows each has computed."""

    def __init__(self, weights: ExpertWeights, num_experts: int) -> None:
        self._weights = weights
        device = weights.gate_up.device
        self._slot_E = torch.full((num_experts,), -1, device=device)
        self._slot_E[weights.experts] = torch.tensor(weights.slots, dtype=torch.int64, device=device)
        self.tokens_E = torch.zeros(num_experts, dtype=torch.int64)

    def __call__(self, x_SD: Tensor, expert_S: Tensor) -> Tensor:
        """Each row through its expert; [S, D].

        Raises:
            RuntimeError: a row for an expert that is not here; computing it anyway would be silently wrong.
        """
        if len(x_SD) == 0:
            return x_SD
        slot_S = self._slot_E[expert_S]
        if bool((slot_S < 0).any()):
            missing = sorted(set(expert_S[slot_S < 0].tolist()))
            raise RuntimeError(f"rows arrived for experts {missing}, which this rank does not hold")
        order_S = torch.argsort(slot_S, stable=True)
        slots, counts = torch.unique_consecutive(slot_S[order_S], return_counts=True)
        x_sorted_SD, y_SD = x_SD[order_S], torch.empty_like(x_SD)
        results = [
            swiglu(rows, self._weights.gate_up[slot], self._weights.down[slot])
            for slot, rows in zip(slots.tolist(), x_sorted_SD.split(counts.tolist()), strict=True)
        ]
        y_SD[order_S] = torch.cat(results)
        self.tokens_E += torch.bincount(expert_S, minlength=len(self.tokens_E)).cpu()
        return y_SD


class MoeLayer:
    """shared_expert(x) + Σ expert(score · x) over the experts a token chose.

    The expert router takes the top of its *logits*, then a sigmoid in float32; scores are not renormalised and
    multiply the expert's input (SwiGLU is not linear, so its output would be another function). Scaling before
    dispatch means scores need not travel. Source: `Llama4TextMoe` in transformers.
    """

    def __init__(
        self,
        weights: MoeWeights,
        placement: Placement,
        exchange: Exchange,
        experts_per_token: int,
        clock: StepClock | None = None,
    ) -> None:
        self._weights = weights
        self._placement = placement
        self._exchange = exchange
        self._clock = clock or StepClock()
        self._top_k = experts_per_token
        self.routed = RoutedExperts(weights.routed, len(weights.router))

    def __call__(self, x_TD: Tensor) -> Tensor:
        logits_TE = torch.nn.functional.linear(x_TD, self._weights.router)
        logits_TK, expert_TK = torch.topk(logits_TE, self._top_k, dim=-1)
        scores_TK = torch.sigmoid(logits_TK.float()).to(x_TD.dtype)
        x_RD = (x_TD[:, None, :] * scores_TK[:, :, None]).flatten(0, 1)
        expert_R = expert_TK.flatten()
        # Processes begin their turns at different replicas, or all would send their only token to the first one.
        process_R = self._placement.process_of(expert_R, start=self._exchange.index)
        self._clock.lap("experts")
        dispatched = self._exchange.dispatch(x_RD, process_R, expert_R)
        self._clock.lap("exchange")
        y_SD = self.routed(dispatched.x_SD, dispatched.expert_S)
        self._clock.lap("experts")
        shared_TD = mlp(x_TD, self._weights.shared)
        self._clock.lap("dense")
        routed_RD = self._exchange.combine(y_SD, dispatched)
        self._clock.lap("exchange")
        return shared_TD + routed_RD.view(len(x_TD), self._top_k, x_TD.shape[1]).sum(dim=1)
