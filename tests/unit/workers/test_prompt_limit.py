"""Streams keep their pace while long prompts arrive: against a simulated clock, for machines of several kinds."""

import random
from collections.abc import Callable
from statistics import median, quantiles

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.block_pool import KVBlocks
from workers.prompt_limit import PROBE_STEPS, PromptLimit, StepWork
from workers.scheduler import Scheduled, Scheduler, step_work
from workers.sequence import Sample, SamplingParams, Sequence

BLOCK = 16
BUDGET = 512

Cost = Callable[[int, int], float]
"""Seconds of a step, from decoded tokens and prompt tokens of the gang."""


def linear(decoding: int, prompt: int) -> float:
    return 0.010 + 0.0002 * decoding + 0.0001 * prompt


def bound_by_memory(decoding: int, prompt: int) -> float:
    """Each token reads experts that no other token wants, until all are read; then computing takes over."""
    read = 128 * (1 - (1 - 1 / 128) ** (decoding + prompt))
    return 0.004 + 0.0002 * read + 0.00005 * (decoding + prompt)


def almost_free(decoding: int, prompt: int) -> float:
    return 0.010 + 0.000001 * prompt


COSTS = [linear, bound_by_memory, almost_free]


class Gang:
    """Ranks that step together, in simulated time."""

    def __init__(self, ranks: int, cost: Cost, ratio: float = 2.0, noise: float = 0.03, seed: int = 0) -> None:
        self.schedulers = [
            Scheduler(KVBlocks(20000, 20000, BLOCK, 8192), BUDGET, 64, False, ratio) for _ in range(ranks)
        ]
        self.works = [StepWork()] * ranks
        self.cost, self.noise, self.chance = cost, noise, random.Random(seed)
        self.now = 0.0
        self.steps: list[tuple[int, int, float]] = []
        self.gaps: list[float] = []
        self.first_token: dict[int, float] = {}
        self.last_token: dict[int, float] = {}
        self.count = 0

    def add(self, rank: int, prompt: int, output: int) -> int:
        self.count += 1
        self.schedulers[rank].add(Sequence(("a", self.count), [1] * prompt, SamplingParams(), output))
        return self.count

    def step(self) -> None:
        plans: list[list[Scheduled]] = []
        for scheduler in self.schedulers:
            plans.append(scheduler.plan())
            has_work = scheduler.num_running + scheduler.num_waiting > 0
            assert bool(plans[-1]) == has_work, "a step that nobody has anything for would be the last"
        self.works = [step_work(plan) for plan in plans]
        decoding, prompt = sum(w.decode_tokens for w in self.works), sum(w.prompt_tokens for w in self.works)
        seconds = self.cost(decoding, prompt) * self.chance.lognormvariate(0, self.noise)
        if self.chance.random() < 0.002:
            seconds *= 5  # Something else held it up.
        self.now += seconds
        self.steps.append((decoding, prompt, seconds))
        for rank, (scheduler, plan) in enumerate(zip(self.schedulers, plans, strict=True)):
            for item in scheduler.commit(plan, [Sample(3) for item in plan if item.samples]):
                number = item.sequence.key[1]
                if number in self.last_token:
                    self.gaps.append(self.now - self.last_token[number])
                self.first_token.setdefault(number, self.now)
                self.last_token[number] = self.now
            scheduler.observe(self.works, rank, seconds)


def p99(values: list[float]) -> float:
    return quantiles(values, n=100)[98]


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(("ranks", "streams"), [(1, 1), (1, 8), (2, 8), (4, 16)])
def test_streams_keep_their_pace_while_long_prompts_arrive(cost: Cost, ranks: int, streams: int) -> None:
    gang = Gang(ranks, cost)
    for number in range(streams):
        gang.add(number % ranks, 20, 1_000_000)
    while len(gang.first_token) < streams:
        gang.step()
    for _ in range(200):
        gang.step()
    gang.gaps.clear()
    for _ in range(300):
        gang.step()
    undisturbed = median(gang.gaps)
    gang.gaps.clear()
    gang.steps.clear()
    # A prompt of 8k is always there, at each rank in turn; each asks for a few tokens.
    arrived = [gang.add(0, 8192, 4)]
    while len(gang.steps) < 4000 and len(arrived) < 12:
        gang.step()
        if arrived[-1] in gang.first_token:
            arrived.append(gang.add(len(arrived) % ranks, 8192, 4))
    # As many steps as the prompts need anyhow may go slower while their cost is being learnt.
    assert p99(gang.gaps) <= 2.5 * undisturbed, f"{p99(gang.gaps) / undisturbed:.2f} times the undisturbed gap"
    assert len(arrived) >= 3, "prompts starve"
    # What the bound allows is used: half of it at least in a step of the middle.
    mixed = [prompt for decoding, prompt, _ in gang.steps if decoding and prompt]
    ideal = max(tokens for tokens in range(1, BUDGET + 1) if cost(streams, tokens) <= 2 * cost(streams, 0))
    assert median(mixed) >= min(ideal, BUDGET) * 0.5 or median(mixed) >= BLOCK >= ideal * 0.5


def test_prompts_on_all_ranks_share_what_is_allowed() -> None:
    gang = Gang(4, linear, noise=0)
    for rank in range(4):
        gang.add(rank, 20, 1_000_000)
    for _ in range(50):
        gang.step()
    alone = median([seconds for _, prompt, seconds in gang.steps if not prompt])
    gang.steps.clear()
    for rank in range(4):
        gang.add(rank, 8192, 4)
    for _ in range(150):
        gang.step()
    late = [step for step in gang.steps[20:] if step[1]]
    assert median(seconds for *_, seconds in late) <= 2.2 * alone
    assert max(prompt for _, prompt, _ in late) <= 2 * 108, "two tokens for one that the bound allows"


def test_other_ranks_streams_count() -> None:
    """A rank that decodes nothing itself holds its prompts back for the streams of another one."""
    gang = Gang(2, linear)
    gang.add(0, 20, 1_000_000)
    for _ in range(100):
        gang.step()
    gang.steps.clear()
    gang.add(1, 8192, 4)
    for _ in range(50):
        gang.step()
    seconds = [step[2] for step in gang.steps]
    assert gang.works[1].prompt_tokens < BUDGET
    # The first step is as it was: of the last agreement the rank knows that nobody but its neighbour decodes.
    assert sorted(seconds)[-5] <= 2.5 * linear(1, 0) * 1.1


def test_nobody_decodes_so_prompts_have_the_whole_budget() -> None:
    gang = Gang(2, linear)
    first = gang.add(0, 8192, 1)
    while first not in gang.first_token:
        gang.step()
    assert [prompt for _, prompt, _ in gang.steps] == [BUDGET] * (8192 // BUDGET)


def test_a_little_is_always_computed() -> None:
    """Where a single prompt token takes many steps' time, prompts get a block's worth, and every one ends."""
    gang = Gang(1, lambda decoding, prompt: 0.001 + 0.1 * prompt)
    gang.add(0, 5, 1_000_000)
    prompts = [gang.add(0, 333, 2) for _ in range(3)]
    for _ in range(5 + 3 * (333 // BLOCK + 3) * (PROBE_STEPS + 1) // PROBE_STEPS + 5):
        gang.step()
    assert all(number in gang.first_token for number in prompts)
    assert [gang.first_token[number] for number in prompts] == sorted(gang.first_token[n] for n in prompts)


def test_the_oldest_long_prompt_goes_first_and_short_ones_are_not_held_back() -> None:
    gang = Gang(1, linear)
    gang.add(0, 5, 1_000_000)
    oldest, short, youngest = (gang.add(0, length, 2) for length in (4000, 100, 2000))
    while len(gang.first_token) < 4:
        gang.step()
    assert gang.first_token[short] < gang.first_token[oldest] / 5
    assert gang.first_token[oldest] < gang.first_token[youngest]


def test_more_streams_are_allowed_more() -> None:
    """What decoding takes is learnt anew as the number of streams changes, also when prompts never cease."""
    gang = Gang(1, lambda decoding, prompt: 0.001 * decoding + 0.0001 * prompt, noise=0.01)
    gang.add(0, 20, 1_000_000)
    backlog = [gang.add(0, 3000, 1_000_000) for _ in range(15)]
    while backlog[-1] not in gang.first_token:
        gang.step()
        assert len(gang.steps) < 20_000
    for _ in range(100):
        gang.step()
    gang.add(0, 200_000, 1)
    gang.steps.clear()
    for _ in range(400):
        gang.step()
    late = [seconds for _, prompt, seconds in gang.steps[100:] if prompt]
    assert 1.5 * 0.016 < median(late) < 2.3 * 0.016


def test_without_measurements_nothing_is_limited() -> None:
    assert PromptLimit(2.0, 16).tokens(5, 512) == 512


def test_the_first_step_with_both_measures_decoding_alone() -> None:
    limit = PromptLimit(2.0, 16)
    limit.observe(StepWork(0, 100), [], 0.1)
    assert limit.tokens(0, 512) == 512
    assert limit.tokens(3, 512) == 0
    limit.observe(StepWork(0, 100), [StepWork(3, 0)], 0.1)
    # Who does not decode itself goes on, so that the step has something for everybody.
    assert limit.tokens(0, 512) == 16
    limit.observe(StepWork(), [StepWork()], 0.1)
    assert limit.tokens(0, 512) == 512, "all were idle"
    limit.observe(StepWork(3, 0), [], 0.01)
    assert limit.tokens(3, 512) == 16, "nothing is known yet of what prompts add"
    limit.observe(StepWork(3, 16), [], 0.01 + 16 * 0.0001)
    assert limit.tokens(3, 512) == 32, "no more than twice what was measured"
    limit.observe(StepWork(3, 32), [], 0.01 + 32 * 0.0001)
    limit.observe(StepWork(3, 64), [], 0.01 + 64 * 0.0001)
    assert limit.tokens(3, 512) == pytest.approx(100, abs=1)
    assert limit.tokens(3, 30) == 30
    limit.observe(StepWork(3, 50), [StepWork(0, 50)], 0.02)
    assert limit.tokens(3, 512) == pytest.approx(50, abs=1), "two share"
    limit.observe(StepWork(3, 0), [StepWork(0, 0)], 0.01)
    assert limit.tokens(3, 512) == pytest.approx(50, abs=1), "still, after a pause"
    limit.observe(StepWork(3, 50), [StepWork(0, 0)], 0.015)
    assert limit.tokens(3, 512) == pytest.approx(100, abs=1)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 512), st.floats(0, 10)), max_size=40),
    st.integers(0, 9),
    st.integers(1, 512),
)
def test_any_measurements_leave_prompts_a_way(steps: list[tuple[int, int, float]], decoding: int, budget: int) -> None:
    limit = PromptLimit(2.0, 16)
    for decoded, prompt, seconds in steps:
        limit.observe(StepWork(decoded, prompt), [], seconds)
    tokens = limit.tokens(decoding, budget)
    assert 0 <= tokens <= budget
    if tokens == 0:
        # Only for a moment.
        limit.observe(StepWork(decoding, 0), [], 0.01)
        assert limit.tokens(decoding, budget) >= min(16, budget)
