"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011). The same key and counter, the same number."""

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10

Words = NDArray[np.uint64]


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, ...]:
    """Four 32-bit words (in 64-bit arrays) from a 128-bit counter and a 64-bit key, element by element."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high, low = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (low >> _SHIFT) ^ c1 ^ k0, low & _LOW, (high >> _SHIFT) ^ c3 ^ k1, high & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniforms(seeds: list[int], siblings: list[int], positions: list[int]) -> NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits for each (seed, sibling, position)."""
    seed, sibling, position = (np.array(values, dtype=np.uint64) for values in (seeds, siblings, positions))
    zero = np.zeros_like(seed)
    w0, w1, _, _ = philox4x32((position & _LOW, position >> _SHIFT, sibling, zero), (seed & _LOW, seed >> _SHIFT))
    bits = (w0 << _SHIFT | w1) >> np.uint64(11)
    return bits.astype(np.float64) / 2.0**53
