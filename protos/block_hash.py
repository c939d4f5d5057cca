"""Names of blocks of tokens: equal where everything up to the block's end is. Pure, and the same in every process.

A block's name is BLAKE2b (16 bytes) over its parent's name and its token ids as little-endian uint32; a first block's
parent is the name of the namespace. So a name stands for the whole prefix, and ranks may keep keys and values under it
while routers guess who has them. The hash is a cryptographic one because a collision would show one client's prefix to
another.
"""

import sys
from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b

BLOCK_HASH_BYTES = 16
_UINT32 = "I"
_VERSION = b"caravan block 1 "


def root_hash(namespace: str = "") -> bytes:
    """Parent of a prompt's first block.

    Args:
        namespace: prefixes of two namespaces are never equal: a tenant's or a model's own.
    """
    return blake2b(_VERSION + namespace.encode(), digest_size=BLOCK_HASH_BYTES).digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name of the block of `token_ids` that follows the block named `parent`.

    Raises:
        OverflowError: a token id is not in 0 to 2^32 - 1.
    """
    packed = array(_UINT32, token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return blake2b(parent + packed.tobytes(), digest_size=BLOCK_HASH_BYTES).digest()


def block_hashes(token_ids: Sequence[int], block_size: int, namespace: str = "") -> Iterator[bytes]:
    """Names of all full blocks, in order; tokens of a last block that is not full have none."""
    parent = root_hash(namespace)
    for end in range(block_size, len(token_ids) + 1, block_size):
        parent = block_hash(parent, token_ids[end - block_size : end])
        yield parent
