"""From logits to tokens.

A draw depends on (seed, sibling, position) and the sequence's own logits alone, so that the same request draws the same
tokens alone, in a full batch, or replayed elsewhere.

Shape suffixes: S sequences, V vocabulary.
"""

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from workers.philox import uniforms
from workers.sequence import Logprobs, Sample, SamplingParams, Sequence

# Below it float32 sees no difference from greedy.
_LEAST_TEMPERATURE = 1e-10
# Past it float32 has no numbers; every token is as likely as any other long before.
_MOST_TEMPERATURE = 1e30


@torch.inference_mode()
def sample(logits_SV: Tensor, sequences: Rows[Sequence]) -> list[Sample]:
    """Draw the next token of each sequence; row i of the float32 logits is sequence i's."""
    if not sequences:
        return []
    adjusted_SV = _adjust(logits_SV, sequences)
    token_S = adjusted_SV.argmax(dim=-1)
    random_rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
    # Apart, or a batch-mate's filter would change the order in which the others' probabilities are summed.
    for is_sorted in (False, True):
        group = [row for row in random_rows if _needs_sorting(sequences[row].sampling) == is_sorted]
        if group:
            token_S[group] = _draw(adjusted_SV[group], [sequences[row] for row in group], is_sorted)
    tokens = token_S.tolist()
    rows = zip(tokens, _chosen_logprobs(logits_SV, sequences, tokens), strict=True)
    return [Sample(token, of_row) for token, of_row in rows]


def _adjust(logits_SV: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """Penalties, and no end before `min_tokens`. A copy where anything changes."""
    penalized = [row for row, sequence in enumerate(sequences) if sequence.sampling.has_penalties]
    held_open = [
        row
        for row, sequence in enumerate(sequences)
        if len(sequence.output_ids) < sequence.min_tokens and sequence.stop_token_ids
    ]
    if not penalized and not held_open:
        return logits_SV
    logits_SV = logits_SV.clone()
    for row in penalized:
        _penalize(logits_SV[row], sequences[row])
    for row in held_open:
        # A checkpoint may name end-of-text tokens that its vocabulary does not hold.
        in_vocabulary = [token for token in sequences[row].stop_token_ids if token < logits_SV.shape[-1]]
        logits_SV[row, in_vocabulary] = -torch.inf
    return logits_SV


def _penalize(logits_V: Tensor, sequence: Sequence) -> None:
    """In place. Repetition (Keskar et al., 2019) sees prompt and output; presence and frequency see the output."""
    sampling, device = sequence.sampling, logits_V.device
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*sequence.prompt_ids, *sequence.output_ids}), dtype=torch.int64, device=device)
        values = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sequence.output_ids:
        tokens, counts = torch.tensor(sequence.output_ids, device=device).unique(return_counts=True)
        logits_V[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def _needs_sorting(sampling: SamplingParams) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0


def _draw(logits_SV: Tensor, sequences: Rows[Sequence], is_sorted: bool) -> Tensor:
    """One token a row by inverting the distribution's cumulative sum at the row's own random number: [S] int64."""
    device = logits_SV.device
    params = [sequence.sampling for sequence in sequences]
    temperature_S1 = torch.tensor(
        [[min(max(p.temperature, _LEAST_TEMPERATURE), _MOST_TEMPERATURE)] for p in params], device=device
    )
    # Less the largest first: a logit divided by a small temperature could overflow.
    probs_SV = torch.softmax((logits_SV - logits_SV.amax(dim=-1, keepdim=True)) / temperature_S1, dim=-1)
    # Without a filter there is nothing to sort for.
    order_SV = None
    if is_sorted:
        probs_SV, order_SV = probs_SV.sort(dim=-1, descending=True, stable=True)
        probs_SV = _top_p(_top_k(probs_SV, [p.top_k for p in params]), [p.top_p for p in params])
    if any(p.min_p for p in params):
        min_p_S1 = torch.tensor([[p.min_p] for p in params], device=device)
        probs_SV = probs_SV.where(probs_SV >= min_p_S1 * probs_SV.amax(dim=-1, keepdim=True), 0.0)
    cumulative_SV = probs_SV.double().cumsum(dim=-1)
    random_S = uniforms(
        [p.seed for p in params], [p.sibling for p in params], [sequence.num_tokens for sequence in sequences]
    )
    target_S1 = torch.from_numpy(random_S).to(device)[:, None] * cumulative_SV[:, -1:]
    place_S1 = torch.searchsorted(cumulative_SV, target_S1, right=True).clamp_(max=logits_SV.shape[-1] - 1)
    return (place_S1 if order_SV is None else order_SV.gather(-1, place_S1)).squeeze(-1)


def _top_k(sorted_SV: Tensor, top_k: list[int]) -> Tensor:
    vocabulary = sorted_SV.shape[-1]
    keep_S1 = torch.tensor([[min(k, vocabulary) or vocabulary] for k in top_k], device=sorted_SV.device)
    kept_SV = sorted_SV.where(torch.arange(vocabulary, device=sorted_SV.device) < keep_S1, 0.0)
    return kept_SV / kept_SV.sum(dim=-1, keepdim=True)


def _top_p(sorted_SV: Tensor, top_p: list[float]) -> Tensor:
    """The likeliest tokens until their sum reaches top_p, the one that reaches it included."""
    top_p_S1 = torch.tensor([[p] for p in top_p], device=sorted_SV.device)
    before_SV = sorted_SV.cumsum(dim=-1) - sorted_SV
    kept_SV = (before_SV < top_p_S1) | (top_p_S1 >= 1.0)  # 1 keeps all, whatever the rounding of the sum says,
    kept_SV[:, 0] = True  # and the likeliest stays, however small top_p is in float32.
    return sorted_SV.where(kept_SV, 0.0)


def _chosen_logprobs(logits_SV: Tensor, sequences: Rows[Sequence], tokens: list[int]) -> list[Logprobs | None]:
    result: list[Logprobs | None] = [None] * len(sequences)
    for row, sequence in enumerate(sequences):
        if sequence.sampling.logprobs is not None:
            result[row] = logprobs(logits_SV[row : row + 1], tokens[row : row + 1], sequence.sampling.logprobs)[0]
    return result


@torch.inference_mode()
def logprobs(logits_SV: Tensor, tokens: Rows[int], count: int) -> list[Logprobs]:
    """Of each row's token and its `count` likeliest ones, by the model's own distribution: before any penalty."""
    logprobs_SV = torch.log_softmax(logits_SV, dim=-1)
    chosen_S = logprobs_SV.gather(-1, torch.tensor(tokens, device=logits_SV.device)[:, None]).squeeze(-1)
    values_SK, ids_SK = logprobs_SV.topk(min(count, logits_SV.shape[-1]), dim=-1)
    rows = zip(tokens, chosen_S.tolist(), ids_SK.tolist(), values_SK.tolist(), strict=True)
    return [Logprobs((token, value), list(zip(ids, values, strict=True))) for token, value, ids, values in rows]
