"""Prefixes computed once: the longest that both pools cover is used, nothing held is evicted, the oldest goes first."""

from collections import OrderedDict
from functools import partial

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.workers.test_scheduler import Harness
from workers.block_pool import BlockPool, KVBlocks, SequenceBlocks
from workers.prefix_cache import PrefixCache
from workers.sequence import SamplingParams, Sequence


class SharedPoolMachine(RuleBasedStateMachine):
    """A pool whose blocks have names, against a table of holders and an order of eviction."""

    @initialize(size=st.integers(1, 8))
    def start(self, size: int) -> None:
        self.pool = BlockPool(size)
        self.held: list[int] = []
        self.names: dict[bytes, int] = {}
        self.unheld: OrderedDict[int, None] = OrderedDict()

    @precondition(lambda self: self.pool.num_free)
    @rule()
    def allocate(self) -> None:
        plain = self.pool.num_blocks - len(set(self.held)) - len(self.unheld)
        (block,) = self.pool.allocate(1)
        assert block not in self.held
        if plain:
            assert block not in self.unheld, "a cached block was taken while there was a free one"
        else:
            assert block == self.unheld.popitem(last=False)[0], "not the least recently used one"
            self.names = {name: other for name, other in self.names.items() if other != block}
        self.held.append(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), name=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def publish(self, data: st.DataObject, name: bytes) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.pool.publish(block, name)
        if name not in self.names and block not in self.names.values():
            self.names[name] = block

    @rule(name=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def share(self, name: bytes) -> None:
        assert self.pool.has(name) == (name in self.names)
        assert self.pool.has(name, must_be_held=True) == (self.names.get(name) in self.held)
        if name in self.names:
            assert self.pool.share(name) == self.names[name]
            self.held.append(self.names[name])
            self.unheld.pop(self.names[name], None)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.pool.free([block])
        self.held.remove(block)
        if block not in self.held and block in self.names.values():
            self.unheld[block] = None

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity([self.held])
            assert self.pool.num_free == self.pool.num_blocks - len(set(self.held))
            assert self.pool.num_cached == len(self.names)


TestSharedPool = SharedPoolMachine.TestCase
TestSharedPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        ("pool._cache._unheld[1] = None", "without a name|waits to be evicted"),
        ("pool._cache._unheld[0] = None", "a held block waits to be evicted"),
        ("pool._cache._block_of[b'y'] = 0", "twice"),
        ("pool._cache._name_of[0] = b'y'; pool._cache._block_of = {b'z': 0}", "lost its name|twice"),
        ("pool._holders[0] = 2", r"blocks \[0\] are held by nobody"),
        ("pool._holders.pop(0)", "is lost"),
    ],
)
def test_integrity_of_what_is_shared_is_checked(spoil: str, sentence: str) -> None:
    pool = BlockPool(2)
    pool.publish(*pool.allocate(1), b"x")
    pool.check_integrity([[0]])
    with pytest.raises(AssertionError, match="does not hold"):
        pool.check_integrity([[0], [0]])
    try:
        exec(spoil, {"pool": pool})
    except KeyError:
        pytest.fail("the test spoils what is not there")
    with pytest.raises((AssertionError, KeyError), match=sentence):
        pool.check_integrity([[0]])


def test_a_name_is_given_once() -> None:
    cache = PrefixCache()
    assert cache.put(b"x", 3)
    assert not cache.put(b"x", 4), "another block of that name is there"
    assert not cache.put(b"y", 3), "the block has a name"
    assert (len(cache), cache.find(b"x"), cache.find(b"y")) == (1, 3, None)
    assert not cache.unhold(4)


def named(number: int) -> bytes:
    return b"block %d" % number


@given(
    block=st.integers(1, 7),
    chunk=st.integers(1, 40),
    blocks=st.integers(0, 14),
    computed=st.integers(0, 60),
    most=st.integers(0, 110),
    data=st.data(),
)
@settings(max_examples=400)
def test_the_longest_prefix_that_both_pools_cover(
    block: int, chunk: int, blocks: int, computed: int, most: int, data: st.DataObject
) -> None:
    assume(computed <= most)
    kv = KVBlocks(300, 300, block, chunk)
    there = {}
    for name in ("global_", "local"):
        pool, present = getattr(kv, name), data.draw(st.sets(st.integers(0, blocks), max_size=blocks + 1), label=name)
        # Mostly all of them, so that long prefixes occur.
        present ^= set(range(blocks)) if data.draw(st.booleans(), label="all but these") else set()
        for number in present:
            pool.publish(*pool.allocate(1), named(number))
        pool.free(range(len(present)))
        there[name] = {number: pool._cache.find(named(number)) for number in present}

    def usable(tokens: int) -> bool:
        first_global, first_local = computed // block, tokens // chunk * chunk // block
        return all(n in there["global_"] for n in range(first_global, tokens // block)) and all(
            n in there["local"] for n in range(max(first_global, first_local), tokens // block)
        )

    owner = SequenceBlocks()
    assert kv.grow(owner, computed)
    kv.trim(owner, computed)
    before = {name: dict(enumerate(getattr(owner, name).blocks, getattr(owner, name).first)) for name in there}
    lengths = [tokens for tokens in range(0, most + 1, block) if tokens > computed and usable(tokens)]
    want = max(lengths, default=computed)
    assert kv.reuse(owner, computed, most, named) == want
    kv.check_integrity([owner])
    if want > computed:
        first = want // chunk * chunk // block
        assert (owner.global_.first, owner.global_.end, owner.local.end) == (0, want // block, want // block)
        assert owner.local.first == first
        for name in there:
            table = getattr(owner, name)
            for number, held in enumerate(table.blocks, table.first):
                assert held == (there if number >= computed // block else before)[name][number]
    # What comes next has room behind it, and all goes back.
    assert kv.grow(owner, want + 3 * chunk)
    kv.trim(owner, want + chunk)
    kv.release(owner)
    kv.check_integrity([])
    assert kv.usage_ratio == 0


def family(number: int, tokens: int, common: int, output: int = 4, **more: object) -> Sequence:
    """Prompts of `tokens` tokens that begin with the same `common` ones."""
    ids = [position if position < common else 1000 * number + position for position in range(tokens)]
    return Sequence(("a", number), ids, SamplingParams(), output, **more)  # type: ignore[arg-type]


def run(harness: Harness, *sequences: Sequence) -> list[int]:
    """Tokens from the cache of each; one after another."""
    for sequence in sequences:
        harness.add(sequence)
        harness.finish()
    return [sequence.num_cached_tokens for sequence in sequences]


def test_a_second_prompt_computes_only_what_is_new() -> None:
    harness = Harness(KVBlocks(50, 50, 4, 100), budget=16, max_num_seqs=4)
    assert run(harness, family(1, 30, 22), family(2, 30, 22), family(3, 22, 22)) == [0, 20, 20]
    scheduler = harness.scheduler
    assert (scheduler.prefix_hit_tokens, scheduler.prefix_lookup_tokens) == (40, 82)
    assert scheduler.num_cached_blocks[0] == scheduler.num_cached_blocks[1] > 5


def test_the_last_token_is_always_computed() -> None:
    harness = Harness(KVBlocks(50, 50, 4, 100), budget=16, max_num_seqs=4)
    assert run(harness, family(1, 24, 24), family(2, 24, 24), family(3, 25, 24), family(4, 1, 1)) == [0, 20, 24, 0]


def test_output_is_a_prefix_too() -> None:
    harness = Harness(KVBlocks(50, 50, 4, 100), budget=16, max_num_seqs=4)
    first = family(1, 10, 10, output=11)
    run(harness, first)
    # 20 of its 21 tokens were computed: the last one drawn never was.
    again = Sequence(("a", 2), first.prompt_ids + first.output_ids, SamplingParams(), 3)
    replay = Sequence(("a", 3), first.prompt_ids, SamplingParams(), 14, output_ids=list(first.output_ids))
    assert run(harness, again, replay) == [20, 20]


def test_without_the_cache_nothing_stays() -> None:
    harness = Harness(KVBlocks(50, 50, 4, 100), budget=16, max_num_seqs=4, prefix_cache=False)
    assert run(harness, family(1, 30, 30), family(2, 30, 30)) == [0, 0]
    assert harness.scheduler.num_cached_blocks == (0, 0)
    assert harness.scheduler.prefix_lookup_tokens == 0


def test_a_prompt_that_runs_is_shared_too() -> None:
    harness = Harness(KVBlocks(50, 50, 4, 100), budget=16, max_num_seqs=4)
    first, second = family(1, 40, 40, output=30), family(2, 44, 40)
    harness.add(first)
    for _ in range(4):
        harness.step()
    harness.add(second)
    harness.step()
    assert second.num_cached_tokens == 40
    assert first.blocks.global_.blocks[:10] == second.blocks.global_.blocks[:10]
    assert first.blocks.local.blocks[:10] == second.blocks.local.blocks[:10]
    held = harness.blocks.global_.num_blocks - harness.blocks.global_.num_free
    assert held == len(set(first.blocks.global_.blocks) | set(second.blocks.global_.blocks))
    harness.finish()


def test_who_comes_together_shares_what_the_first_computed() -> None:
    """Three prompts at once: the two that wait for budget take up what the first has committed by then."""
    harness = Harness(KVBlocks(100, 100, 4, 100), budget=18, max_num_seqs=4)
    sequences = [family(number, 49, 48) for number in (1, 2, 3)]
    for sequence in sequences:
        harness.add(sequence)
    harness.finish()
    # The first took 49 of 3 · 18 tokens; the second had the other 5 before it could take up what was then there.
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, 48 - 5, 48]


def test_a_part_of_a_block_gives_way_to_the_whole_one() -> None:
    harness = Harness(KVBlocks(100, 100, 8, 20), budget=20, max_num_seqs=4)
    first, second = family(1, 60, 58), family(2, 60, 58)
    harness.add(first)
    harness.step()
    harness.add(second)
    harness.finish()
    # It was admitted when 20 tokens were there, had none of the budget for a step, and took up 40 and then all of it.
    assert second.num_cached_tokens == 56


def test_prompt_logprobs_are_computed_but_shared() -> None:
    harness = Harness(KVBlocks(50, 50, 4, 100), budget=16, max_num_seqs=4)
    scored = family(1, 30, 30)
    scored.sampling = SamplingParams(prompt_logprobs=1)
    again = family(2, 30, 30)
    again.sampling = SamplingParams(prompt_logprobs=1)
    assert run(harness, scored, again, family(3, 30, 30)) == [0, 0, 28]
    # Once its first token is out, a prompt's log-probabilities have been sent.
    replay = family(4, 30, 30, output_ids=list(scored.output_ids[:1]))
    replay.sampling = SamplingParams(prompt_logprobs=1)
    assert run(harness, replay) == [28]


@pytest.mark.parametrize(("block", "chunk"), [(4, 16), (4, 18), (5, 16), (16, 5), (3, 7)])
def test_past_chunks_are_not_needed_locally(block: int, chunk: int) -> None:
    """A prefix that ends in a later chunk is used though the local blocks of the earlier ones are gone."""
    kv = KVBlocks(200, 200, block, chunk)
    harness = Harness(kv, budget=16, max_num_seqs=4)
    run(harness, family(1, 60, 60))
    gone = 60 // chunk * chunk // block - 1
    for name in [Sequence.block_name(family(1, 60, 60), block, number) for number in range(max(0, gone))]:
        held = kv.local._cache._block_of.pop(name)
        del kv.local._cache._name_of[held], kv.local._cache._unheld[held]
        kv.local._free.append(held)
    kv.check_integrity([])
    second = family(2, 61, 60)
    assert run(harness, second) == [60 // block * block]
    # But a prefix that ends in one of them is not.
    if gone > 0:
        shorter = gone * block
        third = family(3, shorter + 1, shorter)
        (cached,) = run(harness, third)
        assert cached < shorter or shorter % chunk == 0


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning() -> None:
    harness = Harness(KVBlocks(20, 20, 4, 1000), budget=100, max_num_seqs=4)
    old, young = family(1, 28, 0, output=1), family(2, 28, 0, output=1)
    run(harness, old, young)
    # 6 blocks are free; 10 are wanted: the 4 last ones of the older prefix go.
    run(harness, family(3, 40, 0, output=1))
    again = family(4, 28, 0, output=1)
    again.prompt_ids = list(old.prompt_ids)
    as_young = family(5, 29, 0, output=1)
    as_young.prompt_ids = [*young.prompt_ids, 7]
    # 7 blocks of the younger are there; the 8th costs the older the third of its last 3.
    assert run(harness, as_young, again) == [28, 8]


def test_a_hit_is_safe_from_those_that_grow_beside_it() -> None:
    """All that is free is the prefix another is about to use: it takes it before it is evicted, or goes without."""
    kv = KVBlocks(16, 16, 4, 1000)
    harness = Harness(kv, budget=8, max_num_seqs=3)
    run(harness, family(1, 32, 32, output=1))
    harness.add(family(2, 7, 0, output=25))
    harness.step()
    harness.add(family(3, 36, 32, output=8))
    harness.step()
    harness.add(family(4, 33, 32, output=2))
    harness.finish()
    assert harness.scheduler.prefix_hit_tokens > 0


@given(
    num_blocks=st.integers(12, 30),
    block=st.integers(1, 5),
    chunk=st.integers(1, 30),
    budget=st.integers(1, 20),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_preemption_and_eviction_under_running_requests(
    num_blocks: int, block: int, chunk: int, budget: int, data: st.DataObject
) -> None:
    """Many of few families in a pool that holds two or three; the harness compares every key that is read."""
    kv = KVBlocks(num_blocks, num_blocks, block, chunk)
    harness = Harness(kv, budget, min(budget, 6))
    longest = kv.longest(budget)
    for number in range(10):
        common = data.draw(st.integers(0, longest - 2))
        tokens = data.draw(st.integers(max(1, common), longest - 1))
        harness.add(family(number, tokens, common, output=data.draw(st.integers(1, longest - tokens))))
        for _ in range(data.draw(st.integers(0, 4))):
            harness.step()
    harness.finish()


def test_a_preempted_sequence_takes_up_what_it_had() -> None:
    harness = Harness(KVBlocks(12, 12, 4, 1000), budget=64, max_num_seqs=3)
    sequences = [family(number, 12, 0, output=14) for number in (1, 2, 3)]
    for sequence in sequences:
        harness.add(sequence)
    computed = 0
    while harness.alive:
        plan = harness.scheduler.plan()
        computed += sum(item.end - item.start for item in plan)
        harness.scheduler.commit(plan, harness.runner.execute(plan))
        harness.forget(lambda sequence: len(sequence.output_ids) < 14)
    assert harness.scheduler.num_preemptions > 0
    assert computed < 3 * 25 + harness.scheduler.num_preemptions * 12, "all was computed again"
    # What it finds is its own: that is no saving.
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, 0, 0]
    assert harness.scheduler.prefix_hit_tokens == 0


def test_a_step_that_failed_is_not_in_the_cache() -> None:
    harness = Harness(KVBlocks(50, 50, 4, 100), budget=64, max_num_seqs=4)
    first, second = family(1, 30, 30), family(2, 30, 30)
    harness.scheduler.add(first)
    harness.scheduler.plan()  # Never committed: its blocks hold anything.
    harness.scheduler.abort(first.key)
    assert harness.scheduler.num_cached_blocks == (0, 0)
    assert run(harness, second) == [0]


def test_prompts_of_many_blocks_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from workers import sequence as module

    hashed = []
    original = module.block_hash
    monkeypatch.setattr(module, "block_hash", lambda *given: (hashed.append(1), original(*given))[1])
    harness = Harness(KVBlocks(100, 100, 4, 100), budget=10, max_num_seqs=4)
    run(harness, family(1, 100, 100, output=20))
    assert len(hashed) == 119 // 4
    sequence = family(2, 100, 100)
    assert partial(sequence.block_name, 4)(24) == sequence.block_names[24]
