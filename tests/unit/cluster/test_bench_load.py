"""What a bench sends."""

import itertools
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.bench_load import Load, Mix, Prompts, Shape, arrivals, parse_mix
from cluster.bench_target import LEAST_TOKEN, tokens_end
from cluster.errors import UsageError


def test_closed_loads_send_as_many_as_the_common_load() -> None:
    assert [Load(streams=streams).requests for streams in (1, 2, 8, 64, 256)] == [6, 6, 24, 128, 512]


@given(st.integers(1, 10_000))
def test_every_stream_of_a_closed_load_has_followers(streams: int) -> None:
    assert Load(streams=streams).requests >= 2 * streams


def test_loads_have_names() -> None:
    names = [load.name for load in (Load(streams=1), Load(streams=8, seconds=3), Load(rate=0.5, seconds=3))]
    assert names == ["1 stream", "8 streams", "0.5/s"]


def test_arrivals_are_a_poisson_process() -> None:
    times = list(arrivals(50.0, 200.0, random.Random(3)))
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < 200
    gaps = [after - before for before, after in itertools.pairwise(times)]
    # 10,000 expected, standard deviation 100; of an exponential distribution mean and deviation are the same.
    assert len(times) == pytest.approx(10_000, abs=400)
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.05)


def test_arrivals_are_the_seeds() -> None:
    first, again, other = (list(arrivals(5, 20, random.Random(seed))) for seed in ("a", "a", "b"))
    assert first == again != other


@pytest.mark.parametrize(
    ("text", "mix"),
    [
        ("random", Mix()),
        ("shared-prefix", Mix("shared-prefix", 64)),
        ("shared-prefix:100", Mix("shared-prefix", 100)),
        ("long-prompt", Mix("long-prompt", 8192)),
        ("long-prompt:500", Mix("long-prompt", 500)),
    ],
)
def test_mixes(text: str, mix: Mix) -> None:
    assert parse_mix(text, 128) == mix


@pytest.mark.parametrize("text", ["", "other", "random:5", "shared-prefix:0", "shared-prefix:128", "long-prompt:x"])
def test_bad_mixes_are_a_sentence(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--mix: "):
        parse_mix(text, 128)


def test_prompts_are_fresh_in_range_and_the_seeds() -> None:
    shape = Shape(Mix(), 30, 1)
    prompts, again = Prompts(shape, 1000, "s"), Prompts(shape, 1000, "s")
    drawn = [prompts.next() for _ in range(50)]
    assert drawn == [again.next() for _ in range(50)]
    assert len({tuple(prompt) for prompt in drawn}) == 50
    assert {len(prompt) for prompt in drawn} == {30}
    ids = {token for prompt in drawn for token in prompt}
    assert LEAST_TOKEN <= min(ids) < 40
    assert 980 < max(ids) < 1000


def test_prompts_share_a_prefix_and_nothing_else() -> None:
    prompts = Prompts(Shape(Mix("shared-prefix", 20), 30, 1), 8000, "s")
    drawn = [prompts.next() for _ in range(20)]
    assert {len(prompt) for prompt in drawn} == {30}
    assert len({tuple(prompt[:20]) for prompt in drawn}) == 1
    assert len({tuple(prompt[20:]) for prompt in drawn}) == 20


def test_long_prompts_are_long_and_count_for_the_context() -> None:
    shape = Shape(Mix("long-prompt", 700), 30, 5)
    prompts = Prompts(shape, 8000, "s")
    assert (len(prompts.next()), len(prompts.next_long())) == (30, 700)
    assert shape.longest == 705
    assert Shape(Mix("shared-prefix", 20), 30, 5).longest == 35


@given(st.integers(40, 300_000))
def test_token_ids_are_in_the_vocabulary(vocab_size: int) -> None:
    end = tokens_end(vocab_size)
    assert LEAST_TOKEN < end <= min(vocab_size, 8000)
    # Halved, rounding down, until the vocabulary has it: the one before was too large.
    assert 2 * end + 1 > vocab_size or end == 8000
