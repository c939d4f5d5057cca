"""Tokens a minute that a tenant may ask for."""

from collections.abc import Callable, Mapping

MINUTE_S = 60.0
SWEEP_EVERY = 1024
"""Buckets after which full ones are looked for."""


class Quotas:
    """A bucket a tenant: it holds one minute's tokens and fills evenly.

    A request takes all it may use, and gets back what it did not. One larger than a whole minute's tokens goes through
    when the bucket is full.

    Args:
        everybody: tokens a minute of a tenant not in `own`; 0: no bound.
        own: tokens a minute of single tenants; 0: no bound.
        clock: seconds, never going back.
    """

    def __init__(self, everybody: int, own: Mapping[str, int], clock: Callable[[], float]) -> None:
        self._everybody, self._own, self._clock = everybody, dict(own), clock
        # Tokens in the bucket, and when that was; a tenant not here has a full one.
        self._buckets: dict[str, tuple[float, float]] = {}

    def of(self, tenant: str) -> int:
        """Tokens a minute; 0: no bound."""
        return self._own.get(tenant, self._everybody)

    def take(self, tenant: str, tokens: int) -> float:
        """Takes tokens if there are enough; else says in how many seconds there will be. 0: taken."""
        quota = self.of(tenant)
        if not quota:
            return 0.0
        held = self._held(tenant, quota)
        wanted = min(tokens, quota)
        if held < wanted:
            return (wanted - held) / quota * MINUTE_S
        self._buckets[tenant] = (held - tokens, self._clock())
        if len(self._buckets) % SWEEP_EVERY == 0:
            for name in [name for name in self._buckets if self._held(name, self.of(name)) >= self.of(name)]:
                del self._buckets[name]
        return 0.0

    def give_back(self, tenant: str, tokens: int) -> None:
        """Tokens that were taken and not used."""
        if quota := self.of(tenant):
            held = min(self._held(tenant, quota) + tokens, quota)
            self._buckets[tenant] = (held, self._clock())
            if held >= quota:
                del self._buckets[tenant]

    def _held(self, tenant: str, quota: int) -> float:
        held, since = self._buckets.get(tenant, (float(quota), 0.0))
        return min(quota, held + (self._clock() - since) / MINUTE_S * quota)
