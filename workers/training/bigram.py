"""A bigram model of tokens, the least that a trained model has to beat."""

import math

import numpy as np

DISCOUNT = 0.75


class Bigram:
    """Interpolated Kneser-Ney over pairs of neighbouring tokens.

    Args:
        stream: [N] token numbers below `vocab_size`.
    """

    def __init__(self, stream: np.ndarray, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        pairs = stream[:-1].astype(np.int64) * vocab_size + stream[1:]
        self.pairs, self.counts = np.unique(pairs, return_counts=True)
        first, second = self.pairs // vocab_size, self.pairs % vocab_size
        self.totals = np.bincount(first, weights=self.counts, minlength=vocab_size)
        self.followers = np.bincount(first, minlength=vocab_size)
        # How likely a token is to go on anywhere: by what it follows, not by how often; one more keeps all above 0.
        preceders = np.bincount(second, minlength=vocab_size) + 1.0
        self.anywhere = preceders / preceders.sum()

    def nats(self, ids: np.ndarray) -> float:
        """Negative log-likelihood of ids[1:], each after the one before it."""
        first, second = ids[:-1].astype(np.int64), ids[1:].astype(np.int64)
        pairs = first * self.vocab_size + second
        at = np.minimum(np.searchsorted(self.pairs, pairs), len(self.pairs) - 1)
        counts = np.where(self.pairs[at] == pairs, self.counts[at], 0)
        totals = np.maximum(self.totals[first], 1.0)
        backoff = np.where(self.totals[first] > 0, DISCOUNT * self.followers[first] / totals, 1.0)
        probabilities = np.maximum(counts - DISCOUNT, 0.0) / totals + backoff * self.anywhere[second]
        return -math.fsum(np.log(probabilities))
