"""Blocks: none leaks, none is given twice, and whoever may run alone can."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from workers.block_pool import BlockPool, KVBlocks, SequenceBlocks


class PoolMachine(RuleBasedStateMachine):
    """A pool against a set."""

    held = Bundle("held")

    @initialize(size=st.integers(1, 12))
    def start(self, size: int) -> None:
        self.pool, self.model = BlockPool(size), set[int]()

    @rule(target=held, data=st.data())
    def allocate(self, data: st.DataObject) -> Any:
        count = data.draw(st.integers(0, self.pool.num_free))
        blocks = self.pool.allocate(count)
        assert len(blocks) == count
        assert not self.model & set(blocks), "given to two"
        self.model |= set(blocks)
        return multiple(*blocks)

    @rule(block=consumes(held))
    def free(self, block: int) -> None:
        self.pool.free([block])
        self.model.remove(block)

    @rule(data=st.data())
    def free_what_nobody_holds(self, data: st.DataObject) -> None:
        block = data.draw(st.integers(-1, self.pool.num_blocks).filter(lambda block: block not in self.model))
        with pytest.raises(ValueError, match="nobody holds it"):
            self.pool.free([block])

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity()
            assert self.pool.num_free == self.pool.num_blocks - len(self.model)


class KVMachine(RuleBasedStateMachine):
    """Sequences that grow, advance, trim and go, in pools too small for all."""

    owners = Bundle("owners")

    @initialize(
        num_global=st.integers(1, 30), num_local=st.integers(1, 20), block=st.integers(1, 7), chunk=st.integers(1, 23)
    )
    def start(self, num_global: int, num_local: int, block: int, chunk: int) -> None:
        self.blocks = KVBlocks(num_global, num_local, block, chunk)
        self.alive: list[tuple[SequenceBlocks, dict[str, int]]] = []

    @rule(target=owners)
    def arrive(self) -> Any:
        owner = (SequenceBlocks(), {"room": 0, "computed": 0})
        self.alive.append(owner)
        return owner

    @rule(owner=owners, tokens=st.integers(1, 60))
    def grow(self, owner: tuple[SequenceBlocks, dict[str, int]], tokens: int) -> None:
        tables, state = owner
        before = self._snapshot(), (list(tables.global_.blocks), list(tables.local.blocks))
        if self.blocks.grow(tables, tokens):
            state["room"] = max(state["room"], -(-tokens // self.blocks.block_size) * self.blocks.block_size)
        else:
            assert before == (self._snapshot(), (tables.global_.blocks, tables.local.blocks)), "half a growth"
            wanted = -(-tokens // self.blocks.block_size)
            assert (
                wanted - tables.global_.end > self.blocks.global_.num_free
                or wanted - tables.local.end > self.blocks.local.num_free
            ), "refused, though there is room"

    @rule(owner=owners, data=st.data())
    def compute(self, owner: tuple[SequenceBlocks, dict[str, int]], data: st.DataObject) -> None:
        tables, state = owner
        state["computed"] = data.draw(st.integers(state["computed"], state["room"]))
        self.blocks.trim(tables, state["computed"])

    @rule(owner=owners)
    def release(self, owner: tuple[SequenceBlocks, dict[str, int]]) -> None:
        tables, state = owner
        self.blocks.release(tables)
        state.update(room=0, computed=0)
        assert tables == SequenceBlocks()

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "blocks"):
            return
        self.blocks.check_integrity()
        size, chunk = self.blocks.block_size, self.blocks.chunk_size
        for pool, name in ((self.blocks.global_, "global_"), (self.blocks.local, "local")):
            held = [block for tables, _ in self.alive for block in getattr(tables, name).blocks]
            assert len(held) == len(set(held)) == pool.num_blocks - pool.num_free
        ratio = max(
            1 - self.blocks.global_.num_free / self.blocks.global_.num_blocks,
            1 - self.blocks.local.num_free / self.blocks.local.num_blocks,
        )
        assert self.blocks.usage_ratio == ratio
        for tables, state in self.alive:
            assert tables.global_.first == 0
            assert tables.global_.end * size == tables.local.end * size == state["room"]
            # The chunk of the next position is there from its start, and no block before it.
            chunk_start = state["computed"] // chunk * chunk
            assert tables.local.first <= chunk_start // size
            assert tables.local.first == min(chunk_start // size, tables.local.end) or state["computed"] == 0

    def _snapshot(self) -> tuple[int, int]:
        return self.blocks.global_.num_free, self.blocks.local.num_free


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestKV = KVMachine.TestCase
TestKV.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)

SIZES = {
    "num_global": st.integers(1, 40),
    "num_local": st.integers(1, 40),
    "block": st.integers(1, 9),
    "chunk": st.integers(1, 40),
    "step": st.integers(1, 50),
}


@given(**SIZES, data=st.data())
@settings(max_examples=200)
def test_the_longest_sequence_runs_alone(
    num_global: int, num_local: int, block: int, chunk: int, step: int, data: st.DataObject
) -> None:
    blocks = KVBlocks(num_global, num_local, block, chunk)
    longest = blocks.longest(step)
    assert longest >= min(num_global, num_local) * block, "a pool's worth always fits"
    owner, computed = SequenceBlocks(), 0
    # Steps of all sizes, then of the largest.
    sizes = iter(data.draw(st.lists(st.integers(1, step), max_size=20)))
    while computed < longest:
        end = min(longest, computed + next(sizes, step))
        assert blocks.grow(owner, end), f"no room for positions {computed} to {end}"
        blocks.trim(owner, end)
        computed = end
    blocks.release(owner)
    blocks.check_integrity()
    assert blocks.usage_ratio == 0


def test_local_blocks_of_past_chunks_go_back() -> None:
    blocks = KVBlocks(num_global=100, num_local=100, block_size=4, chunk_size=10)
    owner = SequenceBlocks()
    assert blocks.grow(owner, 31)
    held = list(owner.local.blocks)
    # At position 9 the first chunk is not over; at 10 its first two blocks go, the third holds 8 to 11 of both chunks.
    for computed, first in ((9, 0), (10, 2), (19, 2), (20, 5), (29, 5), (30, 7)):
        blocks.trim(owner, computed)
        assert (owner.local.first, owner.local.blocks) == (first, held[first:])
    assert len(owner.global_.blocks) == 8
    assert blocks.local.num_free == 99


def test_integrity_is_checked() -> None:
    for spoil in ("_free.append(0)", "_holders.update({1: 1})", "_free.pop()"):
        pool = BlockPool(2)
        exec(f"pool.{spoil}", {"pool": pool})
        with pytest.raises(AssertionError):
            pool.check_integrity()
