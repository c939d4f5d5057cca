"""Blocks of KV memory: who has which. Plain data, no torch.

Every sequence has two block tables. *Global* layers keep all positions; *local* (chunked) layers only those from the
start of the current chunk, so the blocks before it go back to their pool as chunks end. The block size need not divide
the chunk: a block that holds positions of two chunks stays until the later one ends.
"""

from collections import deque
from dataclasses import dataclass, field


class BlockPool:
    """Numbers 0 to `num_blocks` - 1, each free or held once.

    Raises:
        ValueError: a block is given back that is not held.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; the caller has made sure that so many are free."""
        blocks = [self._free.popleft() for _ in range(count)]
        self._held.update(blocks)
        return blocks

    def free(self, blocks: list[int]) -> None:
        for block in blocks:
            if block not in self._held:
                raise ValueError(f"block {block} is given back but nobody holds it")
            self._held.remove(block)
            self._free.append(block)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is either free or held, and no one twice."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & self._held, f"blocks {sorted(free & self._held)} are free and held"
        assert len(free) + len(self._held) == self.num_blocks, "a block is lost"


@dataclass
class BlockTable:
    """Blocks of one sequence in one pool, without a gap: blocks[i] holds positions from (first + i) · block size."""

    first: int = 0
    """Number of leading blocks that were given back."""
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
        """0 to 1: the fuller pool."""
        return max(1 - pool.num_free / pool.num_blocks for pool in (self.global_, self.local))

    def grow(self, owner: SequenceBlocks, num_tokens: int) -> bool:
        """Make room for positions 0 to `num_tokens` - 1 in both tables: all of it, or nothing and False."""
        wanted = -(-num_tokens // self.block_size)
        need_global, need_local = max(0, wanted - owner.global_.end), max(0, wanted - owner.local.end)
        if need_global > self.global_.num_free or need_local > self.local.num_free:
            return False
        owner.global_.blocks += self.global_.allocate(need_global)
        owner.local.blocks += self.local.allocate(need_local)
        return True

    def trim(self, owner: SequenceBlocks, num_computed: int) -> None:
        """Give back local blocks that position `num_computed`, the next one, and all later ones cannot see."""
        first_needed = num_computed // self.chunk_size * self.chunk_size // self.block_size
        count = min(first_needed - owner.local.first, len(owner.local.blocks))
        if count > 0:
            self.local.free(owner.local.blocks[:count])
            del owner.local.blocks[:count]
            owner.local.first += count

    def release(self, owner: SequenceBlocks) -> None:
        """Give everything back; the tables are as new."""
        for pool, table in ((self.global_, owner.global_), (self.local, owner.local)):
            pool.free(table.blocks)
            table.first, table.blocks = 0, []

    def fits(self, num_tokens: int, step_tokens: int) -> bool:
        """Whether one sequence of `num_tokens`, computed `step_tokens` at a time, could run alone."""
        return num_tokens <= self.longest(step_tokens)

    def longest(self, step_tokens: int) -> int:
        """The longest sequence that can run alone when a step computes at most `step_tokens` of it."""
        by_global = self.global_.num_blocks * self.block_size
        local_tokens = self.local.num_blocks * self.block_size
        # At worst a step begins at a chunk's last position and the chunk's first block began in the chunk before.
        endless = self.chunk_size + step_tokens + self.block_size
        return by_global if local_tokens >= endless else min(by_global, local_tokens)

    def check_integrity(self) -> None:
        self.global_.check_integrity()
        self.local.check_integrity()
