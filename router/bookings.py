"""Refused requests that were told when to come back: their places are kept, so that coming back is not in vain."""

import heapq
from collections.abc import Callable, Hashable
from dataclasses import dataclass

LEAST_GRACE_S = 2.0
GRACE_SHARE = 0.5
"""Of the delay: how late a request may come back and find its place."""
EARLY_S = 0.05
"""A clock at the other end may run this much ahead."""


@dataclass(eq=False)
class Booking:
    """A place in the queue that was promised."""

    tenant: str
    key: Hashable
    """What it will be known by; None: the caller gave no name."""
    cost: int
    delay_s: float
    due: float
    expires: float
    is_over: bool = False


class Bookings:
    """Who was told to come back, and when.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._named: dict[Hashable, Booking] = {}
        self._by_due: dict[str, list[tuple[float, int, Booking]]] = {}
        self._by_expiry: list[tuple[float, int, Booking]] = []
        self._tokens: dict[str, int] = {}
        self._count = 0

    def tokens_of(self, tenant: str) -> int:
        """Tokens of a tenant's bookings."""
        self._expire()
        return self._tokens.get(tenant, 0)

    def find(self, tenant: str, key: Hashable, is_retry: bool) -> Booking | None:
        """The booking of a request that came back, due or not.

        Args:
            key: its name; None: it has none.
            is_retry: it was refused before. If it is not known by its name (over HTTP each try may have a new one), it
                takes the place of the tenant's that has been due longest: there are as many places as were refused.
        """
        self._expire()
        if tenant not in self._tokens:
            return None
        if (named := self._named.get(key)) is not None:
            return named
        line = self._line(tenant) if is_retry else []
        return line[0][2] if line and not self.early_by(line[0][2]) else None

    def early_by(self, booking: Booking) -> float:
        """Seconds until the time it was told; 0 once that has come."""
        early_s = booking.due - self._clock()
        return early_s if early_s > EARLY_S else 0.0

    def add(self, tenant: str, key: Hashable, cost: int, delay_s: float) -> None:
        """Keeps a place for a request that was told to come back after `delay_s`."""
        now = self._clock()
        due = now + delay_s
        booking = Booking(tenant, key, cost, delay_s, due, due + max(LEAST_GRACE_S, GRACE_SHARE * delay_s))
        self._count += 1
        if key is not None:
            self._named[key] = booking
        heapq.heappush(self._line(tenant), (due, self._count, booking))
        heapq.heappush(self._by_expiry, (booking.expires, self._count, booking))
        self._tokens[tenant] = self._tokens.get(tenant, 0) + cost

    def drop(self, booking: Booking) -> None:
        """The place is taken, or nobody came."""
        if booking.is_over:
            return
        booking.is_over = True
        if booking.key is not None and self._named.get(booking.key) is booking:
            del self._named[booking.key]
        self._tokens[booking.tenant] -= booking.cost
        if not self._tokens[booking.tenant]:
            del self._tokens[booking.tenant]
            self._by_due.pop(booking.tenant, None)

    def _line(self, tenant: str) -> list[tuple[float, int, Booking]]:
        """A tenant's bookings; the first, if any, is not over."""
        line = self._by_due.setdefault(tenant, [])
        while line and line[0][2].is_over:
            heapq.heappop(line)
        return line

    def _expire(self) -> None:
        now = self._clock()
        while self._by_expiry and (self._by_expiry[0][0] < now or self._by_expiry[0][2].is_over):
            self.drop(heapq.heappop(self._by_expiry)[2])
