"""The scheduler with a model that is a hash: it keeps its budget, starves nobody and loses nothing."""

import copy
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.block_pool import KVBlocks
from workers.prompt_limit import StepWork
from workers.scheduler import Emitted, Finish, Scheduled, Scheduler, step_work
from workers.sequence import Sample, SamplingParams, Sequence


def next_token(tokens: Iterable[int]) -> int:
    """What the hash draws after these tokens."""
    return hashlib.blake2b(repr(list(tokens)).encode(), digest_size=1).digest()[0] % 50


def alone(sequence: Sequence) -> list[int]:
    """The outputs a new sequence must end with, whatever runs beside it."""
    output = list(sequence.output_ids)
    while True:
        output.append(next_token(sequence.prompt_ids + output))
        if len(output) >= sequence.min_tokens and output[-1] in sequence.stop_token_ids:
            return output
        if len(output) >= sequence.max_tokens:
            return output


def prefixes(tokens: Iterable[int]) -> list[int]:
    """For each position, a number that stands for all tokens up to it: what its keys and values are made of."""
    made, last = [], 0
    for token in tokens:
        last = hash((last, token))
        made.append(last)
    return made


class FakeRunner:
    """Stores what each position stands for in its slot and reads all that attention would read, through the block
    tables; whoever computed it, it must be what the sequence itself would have."""

    def __init__(self, blocks: KVBlocks) -> None:
        self.blocks = blocks
        self.memory: dict[tuple[str, int], int] = {}

    def execute(self, plan: list[Scheduled]) -> list[Sample]:
        chunk = self.blocks.chunk_size
        wanted = [prefixes(item.sequence.tokens(0, item.sequence.num_tokens)) for item in plan]
        for item, want in zip(plan, wanted, strict=True):
            known = item.sequence.tokens(0, item.sequence.num_tokens)
            assert known == item.sequence.prompt_ids + item.sequence.output_ids
            assert item.sequence.tokens(item.start, item.end) == known[item.start : item.end]
            for position in range(item.start, item.end):
                for name in ("global_", "local"):
                    self.memory[self._slot(item, name, position)] = want[position]
        for item, want in zip(plan, wanted, strict=True):
            for name, first in (("global_", 0), ("local", item.start // chunk * chunk)):
                for position in range(first, item.end):
                    assert self.memory[self._slot(item, name, position)] == want[position], "a key is not where it is"
        return [Sample(next_token(item.sequence.tokens(0, item.end))) for item in plan if item.samples]

    def spoil(self, plan: list[Scheduled]) -> None:
        """Part of a step that is never committed: its slots hold what is of no use."""
        for item in plan:
            for position in range(item.start, item.end):
                for name in ("global_", "local"):
                    self.memory[self._slot(item, name, position)] = -1

    def _slot(self, item: Scheduled, name: str, position: int) -> tuple[str, int]:
        table, size = getattr(item.sequence.blocks, name), self.blocks.block_size
        index = position // size - table.first
        assert index >= 0
        return name, table.blocks[index] * size + position % size


class Harness:
    def __init__(
        self,
        blocks: KVBlocks,
        budget: int,
        max_num_seqs: int,
        prefix_cache: bool = True,
        seconds: Callable[[StepWork], float] | None = None,
    ) -> None:
        """`seconds` is how long the scheduler is told that a step took; None: it is told nothing."""
        self.seconds = seconds
        self.blocks, self.budget, self.max_num_seqs = blocks, budget, max_num_seqs
        self.scheduler = Scheduler(blocks, budget, max_num_seqs, prefix_cache)
        self.runner = FakeRunner(blocks)
        self.alive: list[Sequence] = []
        self.want: dict[Any, list[int]] = {}

    def add(self, sequence: Sequence) -> None:
        self.alive.append(sequence)
        self.want[sequence.key] = alone(sequence)
        self.scheduler.add(sequence)

    def forget(self, keep: Any) -> None:
        self.alive = [sequence for sequence in self.alive if keep(sequence)]

    def step(self) -> list[Emitted]:
        plan = self.scheduler.plan()
        self.check_plan(plan)
        before = {item.sequence.key: item.sequence.num_computed_tokens for item in plan}
        sampling = [item.sequence for item in plan if item.samples]
        emitted = self.scheduler.commit(plan, self.runner.execute(plan))
        if self.seconds is not None:
            work = step_work(Scheduled(item.sequence, item.start, item.end) for item in plan)
            self.scheduler.observe([work], 0, self.seconds(work))
        assert [item.sequence for item in emitted] == sampling
        for item in plan:
            assert item.sequence.num_computed_tokens == item.end > before[item.sequence.key]
        for item in emitted:
            output = item.sequence.output_ids
            assert output[-1] == item.sample.token_id
            assert output == self.want[item.sequence.key][: len(output)]
            assert (item.finish is not None) == (output == self.want[item.sequence.key])
            if item.finish is not None:
                stopped = output[-1] in item.sequence.stop_token_ids and len(output) >= item.sequence.min_tokens
                assert item.finish == (Finish.STOP if stopped else Finish.LENGTH)
        self.forget(lambda sequence: not any(item.sequence is sequence and item.finish for item in emitted))
        self.scheduler.check_integrity()
        return emitted

    def abandon(self) -> None:
        """A step that an epoch's end cuts off."""
        known = {sequence.key: sequence.num_tokens for sequence in self.alive}
        plan = self.scheduler.plan()
        self.check_plan(plan)
        self.runner.spoil(plan)
        assert known == {sequence.key: sequence.num_tokens for sequence in self.alive}
        self.scheduler.check_integrity()

    def check_plan(self, plan: list[Scheduled]) -> None:
        assert bool(plan) == bool(self.alive), "work is there, but nothing is planned"
        assert sum(item.end - item.start for item in plan) <= self.budget
        assert len(plan) <= self.scheduler.num_running <= self.max_num_seqs
        keys = [item.sequence.key for item in plan]
        assert len(set(keys)) == len(keys)
        for item in plan:
            assert item.start == item.sequence.num_computed_tokens < item.end <= item.sequence.num_tokens
        if self.alive and self.seconds is None:
            assert self.alive[0].key in keys, "the oldest does not get on"

    def finish(self) -> int:
        """Steps until all is done; bounded by every token of every sequence, one after another."""
        bound = sum(len(sequence.prompt_ids) + sequence.max_tokens for sequence in self.alive)
        if self.seconds is not None:  # Prompts pause for decoding to be measured alone.
            bound = 2 * bound + 2
        steps = 0
        while self.alive:
            self.step()
            steps += 1
            assert steps <= bound, "somebody starves"
        assert self.scheduler.num_running == self.scheduler.num_waiting == self.scheduler.pending_tokens == 0
        assert self.blocks.usage_ratio == 0
        self.scheduler.check_integrity()
        return steps


POOLS = {
    "num_global": st.integers(2, 24),
    "num_local": st.integers(2, 24),
    "block": st.integers(1, 6),
    "chunk": st.integers(1, 20),
    "budget": st.integers(1, 24),
}


def draw_sequence(data: st.DataObject, key: tuple[str, int], longest: int) -> Sequence:
    prompt = data.draw(st.integers(1, longest - 1), label="prompt tokens")
    room = longest - prompt
    output = data.draw(st.integers(0, min(3, room - 1)), label="replayed tokens")
    max_tokens = data.draw(st.integers(output + 1, room), label="max_tokens")
    stops = data.draw(st.sampled_from([frozenset(), frozenset({1}), frozenset(range(25))]), label="stop ids")
    # Prompts of one family begin alike.
    family, common = data.draw(st.integers(0, 2), label="family"), data.draw(st.integers(0, prompt), label="in common")
    return Sequence(
        key,
        prompt_ids=[(family if position < common else 100 + key[1]) * 60 + position for position in range(prompt)],
        output_ids=list(range(output)),
        sampling=SamplingParams(),
        max_tokens=max_tokens,
        min_tokens=data.draw(st.integers(0, max_tokens), label="min_tokens"),
        stop_token_ids=stops,
    )


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, aborts and steps at random, in pools that hold the longest sequence once."""

    @initialize(**POOLS, data=st.data())
    def start(self, num_global: int, num_local: int, block: int, chunk: int, budget: int, data: st.DataObject) -> None:
        blocks = KVBlocks(num_global, num_local, block, chunk)
        self.harness = Harness(
            blocks,
            budget,
            data.draw(st.integers(1, min(budget, 8)), label="max_num_seqs"),
            prefix_cache=data.draw(st.booleans(), label="prefix cache"),
            seconds=data.draw(
                st.sampled_from([None, lambda work: 0.01, lambda work: 0.001 + work.tokens]), label="pace"
            ),
        )
        self.longest = min(blocks.longest(budget), 60)
        self.count = 0

    @precondition(lambda self: self.longest >= 2)
    @rule(data=st.data(), router=st.sampled_from(["a", "b"]))
    def add(self, data: st.DataObject, router: str) -> None:
        self.count += 1
        self.harness.add(draw_sequence(data, (router, self.count), self.longest))

    @rule(data=st.data())
    def add_twice(self, data: st.DataObject) -> None:
        if self.harness.alive:
            sequence = data.draw(st.sampled_from(self.harness.alive))
            with pytest.raises(ValueError, match="exists already"):
                self.harness.scheduler.add(Sequence(sequence.key, [1], SamplingParams(), 1))

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.harness.alive:
            victim = data.draw(st.sampled_from(self.harness.alive))
            assert self.harness.scheduler.abort(victim.key)
            assert not self.harness.scheduler.abort(victim.key)
            assert not victim.blocks.global_.blocks
            assert not victim.blocks.local.blocks
            self.harness.forget(lambda sequence: sequence is not victim)

    @rule(router=st.sampled_from(["a", "b", "c"]))
    def router_gone(self, router: str) -> None:
        leaving = sum(sequence.key[0] == router for sequence in self.harness.alive)
        assert self.harness.scheduler.abort_router(router) == leaving
        self.harness.forget(lambda sequence: sequence.key[0] != router)

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.harness.step()

    @rule(count=st.integers(1, 3))
    def abandon(self, count: int) -> None:
        for _ in range(count):
            self.harness.abandon()

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "harness"):
            scheduler = self.harness.scheduler
            scheduler.check_integrity()
            assert scheduler.num_running + scheduler.num_waiting == len(self.harness.alive)
            pending = sum(sequence.num_tokens - sequence.num_computed_tokens for sequence in self.harness.alive)
            assert scheduler.pending_tokens == pending
            assert scheduler.prefix_hit_tokens <= scheduler.prefix_lookup_tokens
            for sequence in self.harness.alive:
                assert sequence.was_preempted or sequence.num_cached_tokens <= sequence.num_computed_tokens

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.finish()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


@given(**POOLS, data=st.data())
@settings(max_examples=150)
def test_the_longest_allowed_sequence_runs_to_its_end(
    num_global: int, num_local: int, block: int, chunk: int, budget: int, data: st.DataObject
) -> None:
    blocks = KVBlocks(num_global, num_local, block, chunk)
    longest = blocks.longest(budget)
    if longest < 2:
        return
    prompt = data.draw(st.integers(1, longest - 1))
    harness = Harness(blocks, budget, 1)
    harness.add(Sequence(("a", 1), list(range(prompt)), SamplingParams(), longest - prompt))
    harness.finish()
    assert harness.scheduler.num_preemptions == 0


def crowd(count: int, blocks: KVBlocks, budget: int, max_num_seqs: int, prompt: int = 9, output: int = 12) -> Harness:
    harness = Harness(blocks, budget, max_num_seqs)
    for number in range(count):
        harness.add(Sequence(("a", number), [number] * prompt, SamplingParams(), output))
    return harness


def test_preemption_recomputes_and_nobody_starves() -> None:
    # Room for two and a half sequences of the twelve that run at once.
    harness = crowd(12, KVBlocks(12, 12, 4, 100), budget=16, max_num_seqs=12)
    harness.finish()
    assert harness.scheduler.num_preemptions > 0


def test_the_oldest_is_never_preempted() -> None:
    harness = crowd(8, KVBlocks(12, 12, 2, 100), budget=32, max_num_seqs=8)
    order: list[int] = []
    while harness.alive:
        oldest = harness.alive[0]
        computed = oldest.num_computed_tokens
        emitted = harness.step()
        assert oldest.num_computed_tokens > computed
        order += [item.sequence.key[1] for item in emitted if item.finish]
    assert order == sorted(order)


def test_a_prompt_of_one_token_makes_place_for_an_older_one() -> None:
    """It is planned first, as decoding is; when the older prompt then lacks a block, its place is taken back."""
    harness = Harness(KVBlocks(9, 9, 2, 100), budget=3, max_num_seqs=2)
    harness.add(Sequence(("a", 1), list(range(13)), SamplingParams(), 1))
    harness.step()
    young = Sequence(("a", 2), [50], SamplingParams(), 12)
    harness.add(young)
    # 2 and 1 tokens a step; in the fifth they need 10 blocks.
    for tokens in range(1, 5):
        harness.step()
        assert len(young.output_ids) == tokens
    plan = harness.scheduler.plan()
    assert [(item.sequence.key[1], item.start, item.end) for item in plan] == [(1, 11, 13)]
    assert (harness.scheduler.num_preemptions, harness.scheduler.num_waiting) == (1, 1)
    harness.scheduler.commit(plan, harness.runner.execute(plan))
    harness.forget(lambda sequence: sequence is young)
    harness.finish()


def test_decoding_goes_before_prompts_and_prompts_take_the_rest() -> None:
    harness = crowd(3, KVBlocks(100, 100, 4, 100), budget=10, max_num_seqs=5, prompt=3)
    harness.step()
    long = Sequence(("a", 9), list(range(30)), SamplingParams(), 5)
    harness.add(long)
    plan = harness.scheduler.plan()
    assert [(item.sequence.key[1], item.end - item.start) for item in plan] == [(0, 1), (1, 1), (2, 1), (9, 7)]
    harness.scheduler.commit(plan, harness.runner.execute(plan))
    assert long.num_computed_tokens == 7
    assert not long.output_ids
    assert harness.scheduler.pending_tokens == 3 + 23


def test_prompts_share_a_step_oldest_first() -> None:
    harness = crowd(4, KVBlocks(100, 100, 4, 100), budget=20, max_num_seqs=4, prompt=8)
    plan = harness.scheduler.plan()
    assert [(item.sequence.key[1], item.end) for item in plan] == [(0, 8), (1, 8), (2, 4)]
    assert [item.samples for item in plan] == [True, True, False]


def test_no_more_run_at_once_than_allowed() -> None:
    harness = crowd(9, KVBlocks(100, 100, 4, 100), budget=40, max_num_seqs=4)
    harness.step()
    assert (harness.scheduler.num_running, harness.scheduler.num_waiting) == (4, 5)
    harness.finish()


def test_who_does_not_fit_waits_instead_of_preempting() -> None:
    harness = crowd(6, KVBlocks(8, 8, 4, 100), budget=64, max_num_seqs=6, prompt=9, output=3)
    harness.finish()
    # 3 blocks each: two at a time, and neither pushes the other out.
    assert harness.scheduler.num_preemptions == 0


def test_an_abort_frees_its_blocks_at_once() -> None:
    harness = crowd(2, KVBlocks(20, 20, 4, 100), budget=64, max_num_seqs=2)
    harness.step()
    before = harness.scheduler.kv_usage_ratio
    assert harness.scheduler.abort(("a", 0))
    assert harness.scheduler.kv_usage_ratio == before / 2
    assert harness.scheduler.abort(("a", 1))
    assert harness.scheduler.kv_usage_ratio == 0
    assert harness.scheduler.plan() == []
    assert not harness.scheduler.abort(("a", 7))


@pytest.mark.parametrize(
    ("min_tokens", "stop", "output", "finish"),
    [
        (0, {7}, [5, 7], Finish.STOP),
        (2, {7}, [7, 5, 7], Finish.STOP),
        (2, {7}, [7, 7], Finish.STOP),
        (0, set(), [7, 7, 7, 7], Finish.LENGTH),
        (9, {7}, [7, 7, 7, 7], Finish.LENGTH),
        (0, {7}, [1, 1, 1, 7], Finish.STOP),
    ],
)
def test_ends(min_tokens: int, stop: set[int], output: list[int], finish: Finish) -> None:
    scheduler = Scheduler(KVBlocks(9, 9, 4, 100), 8, 1)
    scheduler.add(
        Sequence(("a", 1), [1, 2], SamplingParams(), 4, min_tokens=min_tokens, stop_token_ids=frozenset(stop))
    )
    finishes = []
    for token in output:
        (emitted,) = scheduler.commit(scheduler.plan(), [Sample(token)])
        finishes.append(emitted.finish)
    assert finishes == [None] * (len(output) - 1) + [finish]
    assert scheduler.plan() == []
    scheduler.check_integrity()


@given(**POOLS, data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_step_that_is_abandoned_is_planned_again(
    num_global: int, num_local: int, block: int, chunk: int, budget: int, data: st.DataObject
) -> None:
    """Beside a gang that is never disturbed: the same tokens, the same counts of what the cache saved."""
    calm, disturbed = (Harness(KVBlocks(num_global, num_local, block, chunk), budget, min(budget, 4)) for _ in range(2))
    longest = min(calm.blocks.longest(budget), 40)
    if longest < 2:
        return
    for number in range(data.draw(st.integers(1, 4), label="sequences")):
        sequence = draw_sequence(data, ("a", number), longest)
        calm.add(sequence)
        disturbed.add(copy.deepcopy(sequence))
    sequences = list(disturbed.alive)
    while disturbed.alive:
        for _ in range(data.draw(st.integers(0, 2), label="abandoned")):
            disturbed.abandon()
        disturbed.step()
    calm.finish()
    assert disturbed.blocks.usage_ratio == 0
    if calm.scheduler.num_preemptions == disturbed.scheduler.num_preemptions == 0:
        assert disturbed.scheduler.prefix_lookup_tokens == calm.scheduler.prefix_lookup_tokens
        assert disturbed.scheduler.prefix_hit_tokens == calm.scheduler.prefix_hit_tokens
    for sequence in sequences:
        assert sequence.output_ids == disturbed.want[sequence.key]


def test_integrity_notices_a_lost_block() -> None:
    blocks = KVBlocks(9, 9, 4, 100)
    scheduler = Scheduler(blocks, 8, 1)
    blocks.global_.allocate(1)
    with pytest.raises(AssertionError, match="held by nobody"):
        scheduler.check_integrity()
