"""Draws: against published numbers, brute force and the reference's logits processors."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from workers.philox import philox4x32, uniforms
from workers.sampler import sample
from workers.sequence import SamplingParams, Sequence

VOCABULARY = 50


def sequence(
    number: int = 0, prompt: list[int] | None = None, output: list[int] | None = None, **params: Any
) -> Sequence:
    more = {name: params.pop(name) for name in ("min_tokens", "stop_token_ids") if name in params}
    return Sequence(("a", number), prompt or [1, 2, 3], SamplingParams(**params), 100, output_ids=output or [], **more)


def logits_of(seed: int, rows: int = 1, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def draws(logits_V: torch.Tensor, count: int, **params: Any) -> np.ndarray:
    """How often each token is drawn by `count` seeds."""
    sequences = [sequence(seed=seed, **params) for seed in range(count)]
    tokens = [item.token_id for item in sample(logits_V.expand(count, -1), sequences)]
    return np.bincount(tokens, minlength=logits_V.shape[-1])


# ---- random numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [  # kat_vectors of Random123, philox4x32 with 10 rounds
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], want: list[int]) -> None:
    c0, c1, c2, c3 = (np.array([word], dtype=np.uint64) for word in counter)
    k0, k1 = (np.array([word], dtype=np.uint64) for word in key)
    assert [int(word[0]) for word in philox4x32((c0, c1, c2, c3), (k0, k1))] == want


def test_uniforms_are_uniform_and_all_of_the_key_matters() -> None:
    values = uniforms([5] * 20000, [0] * 20000, list(range(20000)))
    assert values.min() >= 0.0
    assert values.max() < 1.0
    counts = np.histogram(values, bins=50, range=(0, 1))[0]
    # Chi-squared with 49 degrees of freedom: 85 is past the 99.9th percentile.
    assert float(((counts - 400) ** 2 / 400).sum()) < 85
    # Neighbours are not correlated: 4 standard deviations.
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / math.sqrt(20000)
    top = 2**64 - 1
    keys = [
        (0, 0, 0),
        (1, 0, 0),
        (1 << 32, 0, 0),
        (top, 0, 0),
        (0, 1, 0),
        (0, 2**32 - 1, 0),
        (0, 0, 1),
        (0, 0, 1 << 32),
    ]
    assert len(set(uniforms(*(list(part) for part in zip(*keys, strict=True))).tolist())) == len(keys)


@given(seed=st.integers(0, 2**64 - 1), sibling=st.integers(0, 2**32 - 1), position=st.integers(0, 2**40))
def test_a_number_does_not_depend_on_its_batch(seed: int, sibling: int, position: int) -> None:
    (alone,) = uniforms([seed], [sibling], [position])
    batch = uniforms([7, seed, 8], [0, sibling, 1], [3, position, position])
    assert alone == batch[1]
    assert 0.0 <= alone < 1.0


# ---- distributions -----------------------------------------------------------------------------------------------


def test_greedy_takes_the_likeliest() -> None:
    logits = logits_of(1, 20)
    got = sample(logits, [sequence(n, top_k=3, top_p=0.5, min_p=0.5) for n in range(20)])
    assert [item.token_id for item in got] == logits.argmax(1).tolist()
    assert all(item.logprobs is None for item in got)
    assert sample(torch.empty(0, VOCABULARY), []) == []


def oracle(logits_V: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """Probabilities of the tokens that stay, by the definitions, in plain Python."""
    weights = {
        token: math.exp((value - float(logits_V.max())) / temperature) for token, value in enumerate(logits_V.tolist())
    }
    ranked = sorted(weights, key=lambda token: (-weights[token], token))
    ranked = ranked[: top_k or None]
    total, before, kept = sum(weights[token] for token in ranked), 0.0, []
    for token in ranked:
        if before < top_p or top_p == 1.0:
            kept.append(token)
        before += weights[token] / total
    kept = [token for token in kept if weights[token] >= min_p * weights[kept[0]]]
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 3.0, "top_k": 7},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.1},
        {"temperature": 1.2, "top_k": 12, "top_p": 0.7, "min_p": 0.05},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.0, "top_k": 1000},
    ],
    ids=str,
)
def test_distribution(params: dict[str, Any]) -> None:
    logits_V, count = logits_of(11)[0], 6000
    want = oracle(logits_V, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **params})
    counts = draws(logits_V, count, **params)
    assert set(np.flatnonzero(counts).tolist()) <= set(want), "a token that the filters drop was drawn"
    for token, probability in want.items():
        deviation = math.sqrt(count * probability * (1 - probability))
        assert abs(counts[token] - count * probability) <= 5 * deviation + 1


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
)
@settings(max_examples=100)
def test_what_is_drawn_stays_within_the_filters(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits_V = logits_of(seed)[0]
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    # A little wider, as rounding may go either way at an edge.
    allowed = oracle(logits_V, temperature, top_k, min(1.0, top_p + 1e-5), max(0.0, min_p - 1e-5))
    assert set(np.flatnonzero(draws(logits_V, 50, **params)).tolist()) <= set(allowed)


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        ({"top_k": 9, "top_p": 0.8}, [TopKLogitsWarper(9), TopPLogitsWarper(0.8)]),
    ],
)
def test_filters_keep_what_the_reference_keeps(params: dict[str, Any], warpers: list[Any]) -> None:
    logits_V, temperature = logits_of(5)[0], 1.7
    scores = TemperatureLogitsWarper(temperature)(None, logits_V[None].clone())
    for warper in warpers:
        scores = warper(None, scores)
    kept = torch.isfinite(scores[0]).nonzero().flatten().tolist()
    counts = draws(logits_V, 6000, temperature=temperature, **params)
    assert np.flatnonzero(counts).tolist() == kept


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-45, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = logits_of(3, 40)
    got = sample(logits, [sequence(n, seed=n, temperature=temperature) for n in range(40)])
    assert [item.token_id for item in got] == logits.argmax(1).tolist()


def test_a_huge_temperature_is_uniform() -> None:
    counts = draws(logits_of(3)[0], 5000, temperature=1e30)
    assert abs(counts - 100).max() < 5 * 10


# ---- penalties ---------------------------------------------------------------------------------------------------


def penalized_argmax(logits_V: torch.Tensor, one: Sequence) -> int:
    return sample(logits_V[None], [one])[0].token_id


@given(
    seed=st.integers(0, 10**6),
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30),
    output=st.lists(st.integers(0, VOCABULARY - 1), max_size=30),
    repetition=st.sampled_from([1.0, 0.5, 1.3, 4.0]),
    presence=st.sampled_from([0.0, -2.0, 1.5]),
    frequency=st.sampled_from([0.0, -1.0, 0.7]),
)
def test_penalties(
    seed: int, prompt: list[int], output: list[int], repetition: float, presence: float, frequency: float
) -> None:
    logits = logits_of(seed)
    want = RepetitionPenaltyLogitsProcessor(repetition)(torch.tensor([prompt + output]), logits.clone())[0]
    for token in set(output):
        want[token] -= presence + frequency * output.count(token)
    one = sequence(
        prompt=prompt,
        output=output,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logprobs=VOCABULARY,
    )
    before = logits.clone()
    (got,) = sample(logits, [one])
    assert torch.equal(logits, before), "the caller's logits were changed"
    assert float(want[got.token_id]) >= float(want.max()) - 1e-5
    # Log-probabilities stay the model's own.
    assert got.logprobs is not None
    log_softmax = torch.log_softmax(logits[0], -1)
    assert dict(got.logprobs.top) == pytest.approx(dict(enumerate(log_softmax.tolist())), abs=1e-5)


def test_penalties_shift_the_whole_distribution() -> None:
    """Not only the best token: what is drawn at a temperature follows the penalized logits."""
    logits_V = torch.zeros(4)
    params = {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.0}
    one = {"prompt": [3], "output": [0, 1, 1]}
    counts = draws(logits_V, 5000, temperature=0.5, **params, **one)
    want = torch.softmax(torch.tensor([-1.5, -2.0, 0.0, 0.0]) / 0.5, 0).numpy() * 5000
    assert abs(counts - want).max() < 5 * 36


def test_penalties_of_one_are_not_anothers() -> None:
    logits = logits_of(2).expand(3, -1)
    best = int(logits[0].argmax())
    got = sample(
        logits, [sequence(), sequence(1, output=[best] * 9, frequency_penalty=2.0), sequence(2, output=[best])]
    )
    assert [item.token_id == best for item in got] == [True, False, True]


def test_no_end_before_min_tokens() -> None:
    logits_V = logits_of(4)[0]
    best, second = logits_V.topk(2).indices.tolist()
    stops = frozenset({best})
    for output, want in (([], second), ([9], second), ([9, 9], best)):
        one = sequence(output=output, min_tokens=2, stop_token_ids=stops)
        assert penalized_argmax(logits_V, one) == want
    counts = draws(logits_V, 5000, temperature=1.0, min_tokens=2, stop_token_ids=stops)
    assert counts[best] == 0
    # Nothing to hold open: without stop ids the same as ever.
    assert penalized_argmax(logits_V, sequence(min_tokens=9)) == best


def test_a_stop_id_outside_the_vocabulary_changes_nothing() -> None:
    """A checkpoint may name end-of-text tokens that its own vocabulary does not hold."""
    logits_V = logits_of(4)[0]
    one = sequence(min_tokens=2, stop_token_ids=frozenset({VOCABULARY, 200001}))
    assert penalized_argmax(logits_V, one) == int(logits_V.argmax())


# ---- log-probabilities -------------------------------------------------------------------------------------------


def test_logprobs() -> None:
    logits = logits_of(6, 3)
    want = torch.log_softmax(logits, -1)
    sequences = [
        sequence(0, logprobs=0),
        sequence(1, logprobs=5, temperature=0.2, top_k=1, seed=3, repetition_penalty=3.0),
        sequence(2),
    ]
    got = sample(logits, sequences)
    assert got[2].logprobs is None
    for row, count in ((0, 0), (1, 5)):
        logprobs = got[row].logprobs
        assert logprobs is not None
        token, value = logprobs.chosen
        assert token == got[row].token_id
        assert value == pytest.approx(float(want[row, token]), abs=1e-6)
        values, ids = want[row].topk(count)
        assert [token for token, _ in logprobs.top] == ids.tolist()
        assert [value for _, value in logprobs.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_more_logprobs_than_tokens() -> None:
    (got,) = sample(logits_of(6, 1, vocabulary=4), [sequence(prompt=[1], logprobs=20)])
    assert got.logprobs is not None
    assert len(got.logprobs.top) == 4


# ---- the same request draws the same -----------------------------------------------------------------------------

PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 0, 3, 20]),
        "top_p": st.sampled_from([1.0, 1.0, 0.5, 0.95]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.2]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "logprobs": st.sampled_from([None, 3]),
        "seed": st.integers(0, 2**64 - 1),
        "sibling": st.integers(0, 3),
        "min_tokens": st.sampled_from([0, 9]),
        "stop_token_ids": st.sampled_from([frozenset(), frozenset({1, 2})]),
        "output": st.lists(st.integers(0, VOCABULARY - 1), max_size=5),
    }
)


@given(batch=st.lists(PARAMS, min_size=2, max_size=8), seed=st.integers(0, 10**6))
@settings(max_examples=100)
def test_batch_mates_change_nothing(batch: list[dict[str, Any]], seed: int) -> None:
    logits = logits_of(seed, len(batch))
    sequences = [sequence(number, **params) for number, params in enumerate(batch)]
    together = sample(logits, sequences)
    for row, one in enumerate(sequences):
        assert sample(logits[row : row + 1], [one]) == [together[row]]


def test_siblings_and_positions_draw_differently() -> None:
    logits = torch.zeros(64, 1000)
    siblings = sample(logits, [sequence(n, temperature=1.0, seed=1, sibling=n) for n in range(64)])
    positions = sample(logits, [sequence(n, temperature=1.0, seed=1, output=[0] * n) for n in range(64)])
    seeds = sample(logits, [sequence(n, temperature=1.0, seed=n) for n in range(64)])
    for drawn in (siblings, positions, seeds):
        assert len({item.token_id for item in drawn}) > 55


@pytest.mark.parametrize("params", [{"top_p": 1e-60, "temperature": 1.0}, {"top_p": 1e-60, "temperature": 1e300}])
def test_numbers_that_float32_lacks_still_draw_a_likely_token(params: dict[str, float]) -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    sequence = Sequence(("r", 1), [1, 2], SamplingParams(seed=3, **params), max_tokens=4)
    (drawn,) = sample(logits, [sequence])
    if params["temperature"] == 1.0:
        assert drawn.token_id == int(logits.argmax())
    assert 0 <= drawn.token_id < 50
