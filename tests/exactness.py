"""The exactness rule, for every test that compares greedy float32 tokens with the reference implementation.

A first divergence counts unless the reference hesitates: its gap between the top two tokens, or between the last expert
it chose and the next best in any layer, is below 1e-4 at or before that position. Such ones are excused, counted and
printed; more than one in a hundred is a failure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import Llama4ForCausalLM
from transformers.models.llama4.modeling_llama4 import Llama4Router

MARGIN = 1e-4
MOST_EXCUSED = 0.01


@dataclass(frozen=True)
class Followed:
    """The reference's view of a sequence, n output positions."""

    token_ids: list[int]
    """What it would have drawn at each, given the tokens before: [n]."""
    margin_n: Tensor
    """The smallest gap, of tokens or experts, at or before each: [n]."""


class Reference:
    """A transformers model that tells what it was unsure of."""

    def __init__(self, model: Llama4ForCausalLM) -> None:
        self.model = model.eval()
        self._router_logits: list[Tensor] = []
        self._top_k = model.config.num_experts_per_tok
        for module in model.modules():
            if isinstance(module, Llama4Router):
                module.register_forward_hook(lambda _module, _args, output: self._router_logits.append(output[1]))

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """[T, V] in the model's type; leaves the expert routers' logits in `_router_logits`."""
        self._router_logits.clear()
        return self.model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]

    def follow(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> Followed:
        """One pass over a finished sequence tells the same as generating it: up to the first divergence the
        tokens before are the reference's own."""
        logits_nV = self.logits([*prompt_ids, *output_ids])[len(prompt_ids) - 1 : -1].float()
        values_n2, tokens_n2 = logits_nV.topk(2)
        margin_n = values_n2[:, 0] - values_n2[:, 1]
        for logits_TE in self._router_logits:
            if logits_TE.shape[1] > self._top_k:
                chosen_TK = logits_TE.float().topk(self._top_k + 1).values
                hesitation_T = (chosen_TK[:, -2] - chosen_TK[:, -1]).cummin(0).values
                margin_n = margin_n.minimum(hesitation_T[len(prompt_ids) - 1 : -1])
        return Followed(tokens_n2[:, 0].tolist(), margin_n.cummin(0).values)


@dataclass(frozen=True)
class Written:
    """A checkpoint on disk and the model it holds."""

    folder: Path
    reference: Reference


@dataclass
class Exactness:
    """Counts comparisons; one for a test session."""

    compared: int = 0
    excused: list[str] = field(default_factory=list)

    def check(
        self, reference: Reference, prompt_ids: Sequence[int], output_ids: Sequence[int], what: str = "a sequence"
    ) -> None:
        """Raise AssertionError if `output_ids` is not the reference's greedy continuation, by the rule."""
        self.compared += 1
        followed = reference.follow(prompt_ids, output_ids)
        pairs = enumerate(zip(followed.token_ids, output_ids, strict=True))
        first = next((position for position, (want, got) in pairs if want != got), None)
        if first is None:
            return
        margin = float(followed.margin_n[first])
        sentence = (
            f"{what}: token {first} of the output is {output_ids[first]}, the reference draws "
            f"{followed.token_ids[first]}; its smallest gap up to there is {margin:.2e}"
        )
        assert margin < MARGIN, sentence
        self.excused.append(sentence)

    def verify(self) -> None:
        """Raise AssertionError if more was excused than the rule allows."""
        assert len(self.excused) <= MOST_EXCUSED * self.compared, "\n".join([self.summary, *self.excused])

    @property
    def summary(self) -> str:
        return f"exactness rule: {self.compared} sequences compared, {len(self.excused)} excused"
