"""Blocks of KV memory: who has which. Plain data, no torch.

Every sequence has two block tables. *Global* layers keep all positions; *local* (chunked) layers only those from the
start of the current chunk, so the blocks before it go back to their pool as chunks end. The block size need not divide
the chunk: a block that holds positions of two chunks stays until the later one ends.

Full blocks may be shared: a sequence whose tokens begin as another's did takes the blocks that hold them, in both
tables, instead of computing them again. Nothing is copied, and what is shared is never written.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from workers.prefix_cache import PrefixCache


class BlockPool:
    """Numbers 0 to `num_blocks` - 1, each held by one table or more, kept in the cache, or free.

    Raises:
        ValueError: a block is given back that is not held.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._holders: dict[int, int] = {}
        self._cache = PrefixCache()
        self.num_evictions = 0

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds: they can be allocated, cached or not."""
        return len(self._free) + self._cache.num_unheld

    @property
    def num_cached(self) -> int:
        """Blocks that a later sequence can use again, held ones included."""
        return len(self._cache)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; the caller has made sure that so many are free. Cached ones go last, oldest first."""
        blocks = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back, each by one holder; of cached ones the first to be given back is the first evicted."""
        for block in blocks:
            holders = self._holders.get(block, 0)
            if holders == 0:
                raise ValueError(f"block {block} is given back but nobody holds it")
            if holders > 1:
                self._holders[block] = holders - 1
                continue
            del self._holders[block]
            if not self._cache.unhold(block):
                self._free.append(block)

    def has(self, name: bytes, must_be_held: bool = False) -> bool:
        """Whether a block of that name is cached, and, where it must be, held by somebody."""
        block = self._cache.find(name)
        return block is not None and (not must_be_held or block in self._holders)

    def share(self, name: bytes) -> int:
        """Hold the cached block of that name, as others may do already; the caller has made sure that it is there."""
        block = self._cache.find(name)
        assert block is not None
        holders = self._holders.get(block, 0)
        if holders == 0:
            self._cache.hold(block)
        self._holders[block] = holders + 1
        return block

    def publish(self, block: int, name: bytes) -> None:
        """Let others share a held block, which is complete; where one of that name is there already, that one stays."""
        self._cache.put(name, block)

    def check_integrity(self, tables: Iterable[Iterable[int]] | None = None) -> None:
        """Raise AssertionError unless every block is held, cached or free, none is lost and none is two of these.

        Args:
            tables: the blocks of each table there is; as many must hold a block as the pool believes.
        """
        self._cache.check_integrity()
        free, unheld = set(self._free), set(self._cache.unheld)
        assert len(free) == len(self._free), "a block is free twice"
        for other, name in ((unheld, "cached"), (self._holders.keys(), "held")):
            assert not free & other, f"blocks {sorted(free & other)} are free and {name}"
        assert not unheld & self._holders.keys(), "a held block waits to be evicted"
        assert len(free) + len(unheld) + len(self._holders) == self.num_blocks, "a block is lost"
        if tables is not None:
            held = Counter(block for table in tables for block in table)
            lost = sorted(block for block, count in self._holders.items() if held[block] < count)
            assert not lost, f"blocks {lost} are held by nobody"
            assert held == self._holders, "a table has blocks it does not hold"

    def _evict(self) -> int:
        self.num_evictions += 1
        return self._cache.evict()


@dataclass
class BlockTable:
    """Blocks of one sequence in one pool, without a gap: blocks[i] holds positions from (first + i) · block size."""

    first: int = 0
    """Number of leading blocks that were given back, or never needed."""
    blocks: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Blocks of the sequence so far, those given back included."""
        return self.first + len(self.blocks)


@dataclass
class SequenceBlocks:
    """Both block tables of one sequence."""

    global_: BlockTable = field(default_factory=BlockTable)
    local: BlockTable = field(default_factory=BlockTable)


class KVBlocks:
    """The two pools of a rank. Sizes in tokens unless they say blocks.

    Args:
        chunk_size: local attention's chunk.
    """

    def __init__(self, num_global: int, num_local: int, block_size: int, chunk_size: int) -> None:
        self.block_size, self.chunk_size = block_size, chunk_size
        self.global_, self.local = BlockPool(num_global), BlockPool(num_local)

    @property
    def usage_ratio(self) -> float:
        """0 to 1: the fuller pool. Blocks that only the cache keeps are not in use."""
        return max(1 - pool.num_free / pool.num_blocks for pool in (self.global_, self.local))

    def grow(self, owner: SequenceBlocks, num_tokens: int) -> bool:
        """Make room for positions 0 to `num_tokens` - 1 in both tables: all of it, or nothing and False."""
        wanted = -(-num_tokens // self.block_size)
        need_global, need_local = max(0, wanted - owner.global_.end), max(0, wanted - owner.local.end)
        if need_global == need_local == 0:  # The most of the time: a decoding sequence in its last block.
            return True
        if need_global > self.global_.num_free or need_local > self.local.num_free:
            return False
        owner.global_.blocks += self.global_.allocate(need_global)
        owner.local.blocks += self.local.allocate(need_local)
        return True

    def trim(self, owner: SequenceBlocks, num_computed: int) -> None:
        """Give back local blocks that position `num_computed`, the next one, and all later ones cannot see."""
        count = min(self._first_local(num_computed) - owner.local.first, len(owner.local.blocks))
        if count > 0:
            # A prefix is worth nothing without its beginning, so its end is evicted first.
            self.local.free(reversed(owner.local.blocks[:count]))
            del owner.local.blocks[:count]
            owner.local.first += count

    def release(self, owner: SequenceBlocks) -> None:
        """Give everything back; the tables are as new."""
        for pool, table in ((self.global_, owner.global_), (self.local, owner.local)):
            pool.free(reversed(table.blocks))
            table.first, table.blocks = 0, []

    def publish(self, owner: SequenceBlocks, start: int, end: int, name: Callable[[int], bytes]) -> None:
        """Let others share the blocks that were completed when positions `start` to `end` - 1 were computed.

        Args:
            name: name of the owner's block of that number.
        """
        for number in range(start // self.block_size, end // self.block_size):
            self.global_.publish(owner.global_.blocks[number - owner.global_.first], name(number))
            if number >= owner.local.first:
                self.local.publish(owner.local.blocks[number - owner.local.first], name(number))

    def reuse(self, owner: SequenceBlocks, num_computed: int, num_tokens: int, name: Callable[[int], bytes]) -> int:
        """Give the owner, which has computed `num_computed` tokens, the cached blocks of those that follow.

        A prefix can be used up to a block's end where the global pool has every block of it, and the local pool those
        of the chunk that the next position stands in. The owner's own block that is computed in part makes place.

        Args:
            num_tokens: no token from here on may come from the cache.
            name: name of the owner's block of that number; asked for in order, up to the first that is not there.

        Returns:
            Tokens computed now: as before, or a greater multiple of the block size.
        """
        start = num_computed // self.block_size
        end = self._covered(start, num_tokens // self.block_size, name)
        if end == start:
            return num_computed
        _take_cached(self.global_, owner.global_, 0, start, end, name)
        _take_cached(self.local, owner.local, self._first_local(end * self.block_size), start, end, name)
        return end * self.block_size

    def missing(self, owner: SequenceBlocks, num_tokens: int, step_tokens: int) -> tuple[int, int]:
        """Blocks the owner lacks in each pool to get to `num_tokens`, when a step computes `step_tokens` at most."""
        return self._missing(owner.global_.end, len(owner.local.blocks), num_tokens, step_tokens)

    def missing_anew(self, num_tokens: int, step_tokens: int, name: Callable[[int], bytes] | None) -> tuple[int, int]:
        """The same for a new owner, that will share what others hold.

        Args:
            name: as for `reuse`; None: it shares nothing.
        """
        if name is None:
            return self._missing(0, 0, num_tokens, step_tokens)
        end = self._covered(0, (num_tokens - 1) // self.block_size, name, must_be_held=True)
        return self._missing(end, end - self._first_local(end * self.block_size), num_tokens, step_tokens)

    def longest(self, step_tokens: int) -> int:
        """The longest sequence that can run alone when a step computes at most `step_tokens` of it."""
        by_global = self.global_.num_blocks * self.block_size
        local_tokens = self.local.num_blocks * self.block_size
        return by_global if local_tokens >= self._window(step_tokens) else min(by_global, local_tokens)

    def check_integrity(self, owners: Iterable[SequenceBlocks] | None = None) -> None:
        """Raise AssertionError unless the pools add up, and what `owners` hold is what the pools believe."""
        tables = None if owners is None else list(owners)
        self.global_.check_integrity(None if tables is None else (owner.global_.blocks for owner in tables))
        self.local.check_integrity(None if tables is None else (owner.local.blocks for owner in tables))

    def _first_local(self, num_computed: int) -> int:
        """The first block that position `num_computed` sees in local layers, or would stand in."""
        return num_computed // self.chunk_size * self.chunk_size // self.block_size

    def _window(self, step_tokens: int) -> int:
        # At worst a step begins at a chunk's last position and the chunk's first block began in the chunk before.
        return self.chunk_size + step_tokens + self.block_size

    def _missing(self, num_blocks: int, num_local: int, num_tokens: int, step_tokens: int) -> tuple[int, int]:
        """Of who has `num_blocks` behind it and holds `num_local` local ones."""
        still = max(0, -(-num_tokens // self.block_size) - num_blocks)
        return still, max(0, min(still, -(-self._window(step_tokens) // self.block_size) - num_local))

    def _covered(self, start: int, most: int, name: Callable[[int], bytes], must_be_held: bool = False) -> int:
        """Where the longest usable prefix ends that goes on from block `start`, in blocks, at most `most`.

        Args:
            must_be_held: of the cached blocks, only those count that somebody holds.
        """
        end = start
        while end < most and self.global_.has(name(end), must_be_held):
            end += 1
        while True:
            first = max(start, self._first_local(end * self.block_size))
            there = range(end - 1, first - 1, -1)
            gap = next((number for number in there if not self.local.has(name(number), must_be_held)), None)
            if gap is None:
                return end
            # The chunk of a shorter prefix begins no later, so none that ends behind the gap can do without it.
            end = gap


def _take_cached(
    pool: BlockPool, table: BlockTable, first: int, start: int, end: int, name: Callable[[int], bytes]
) -> None:
    """Make the table begin at block `first`, with its own blocks before `start` and cached ones from there to `end`."""
    first = max(first, table.first)
    own = slice(min(first, start) - table.first, start - table.first)
    # Dropping blocks makes them free, but evicts none: all that were found are still there.
    pool.free(reversed(table.blocks[own.stop :]))
    pool.free(reversed(table.blocks[: own.start]))
    shared = [pool.share(name(number)) for number in range(max(first, start), end)]
    table.first, table.blocks = first, table.blocks[own] + shared
