"""Which blocks of a pool keep keys and values that a later sequence can use again. Plain data, no torch."""

from collections import OrderedDict


class PrefixCache:
    """Blocks by the name of what they hold (protos/block_hash.py), and those nobody holds, least recently used first.

    A block is put in once what it holds is complete; it leaves when its memory is wanted for something else, which can
    only happen while nobody holds it.
    """

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        """Blocks in the cache, held ones included."""
        return len(self._block_of)

    @property
    def num_unheld(self) -> int:
        """Blocks in the cache that nobody holds: what `evict` can take."""
        return len(self._unheld)

    @property
    def unheld(self) -> list[int]:
        """The same, in the order they would be evicted."""
        return list(self._unheld)

    def find(self, name: bytes) -> int | None:
        """The block of that name. Looking is not using: the order stays."""
        return self._block_of.get(name)

    def put(self, name: bytes, block: int) -> bool:
        """Add a held block. False: another one of that name is there, or the block has a name; nothing changes."""
        if name in self._block_of or block in self._name_of:
            return False
        self._block_of[name], self._name_of[block] = block, name
        return True

    def hold(self, block: int) -> None:
        """Somebody uses a block that nobody held."""
        del self._unheld[block]

    def unhold(self, block: int) -> bool:
        """The last who held a block gave it back. False: it is not in the cache."""
        if block not in self._name_of:
            return False
        self._unheld[block] = None
        return True

    def evict(self) -> int:
        """Forget the least recently used block that nobody holds and return it; the caller has made sure of one."""
        block, _ = self._unheld.popitem(last=False)
        del self._block_of[self._name_of.pop(block)]
        return block

    def check_integrity(self) -> None:
        """Raise AssertionError unless names and blocks are each other's, and every block to be evicted has a name."""
        assert len(self._block_of) == len(self._name_of), "a name or a block is in the cache twice"
        assert all(self._block_of.get(name) == block for block, name in self._name_of.items()), "a block lost its name"
        assert self._unheld.keys() <= self._name_of.keys(), "a block without a name waits to be evicted"
