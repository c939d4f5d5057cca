"""Who may wait for a rank, who is told to come back, and when. Plain data and a clock: nothing here waits.

The queue is counted in the tokens its requests may take at most (prompt and max_tokens), so its bound holds whatever
they do; times are predicted with the share of them that requests take in the end, as measured.

A tenant may queue in proportion to the tokens that are free beside it. So nobody fills the queue alone, and there is
room for who comes next. A refused request is told the time its tenant's queue needs to drain for it, at the measured
rate, and a place is kept for it: those who come unannounced are served after those who were told.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from router.bookings import Bookings
from router.errors import Overloaded
from router.fair_queue import FairQueue, Ticket
from router.quota import Quotas
from router.rate import RateMeter, UsedShare

T = TypeVar("T")

NEWCOMERS_SHARE = 0.7
"""A tenant's queue, as a share of the tokens free beside it: alone it holds up to 41% of the bound."""
RETURNING_SHARE = 2.0
"""The same for requests that were told to come back, should the rate have been misjudged: up to 67%."""
FILLING_SHARE = 0.25
"""Up to this, newcomers are taken before those who have yet to come back: ranks must not wait for them."""
DELAY_MARGIN = 1.1
"""Those who come back are spread a little wider than the rate says: newcomers fill what they leave."""
MISJUDGED_SHARE = 0.1
LEAST_DELAY_S = 0.1
MOST_DELAY_S = 600.0
"""Longest delay that is told; no place is kept so far ahead."""


@dataclass(frozen=True)
class AdmissionLimits:
    """Bounds of the queue."""

    max_queued_tokens: int
    """Tokens of waiting requests, prompts and max_tokens."""
    tokens_per_minute: int = 0
    """Of each tenant; 0: no bound."""
    tenant_tokens_per_minute: Mapping[str, int] = field(default_factory=dict)
    """Of single tenants."""
    assumed_tokens_per_s: float = 1000.0
    """What delays are computed with until a rate was measured."""


class Admission(Generic[T]):
    """The queue before the ranks.

    Args:
        limits: its bounds.
        clock: seconds, never going back.
    """

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self.queue = FairQueue[T]()
        self.rate = RateMeter(clock)
        self._used = UsedShare()
        self._bookings = Bookings(clock)
        self._quotas = Quotas(limits.tokens_per_minute, limits.tenant_tokens_per_minute, clock)
        self._num_started = 0

    @property
    def cost_per_s(self) -> float:
        """Tokens that requests may take, as they are worked off in a second."""
        return (self.rate.tokens_per_s or self._limits.assumed_tokens_per_s) / self._used.ratio

    def offer(
        self,
        ticket: Ticket[T],
        *,
        has_room: bool = False,
        within_s: float | None = None,
        key: Hashable = None,
        is_retry: bool = False,
    ) -> None:
        """Queues a ticket, or says why not.

        Args:
            has_room: a rank could start it now.
            within_s: seconds after which it need not start any more; None: no bound.
            key: what a refused request will be known by when it comes back; None: it has no name.
            is_retry: it was refused before.

        Raises:
            Overloaded: with the seconds after which to come back.
        """
        if not (has_room and not self.queue.total):
            self._check_wait(ticket, within_s)
            self._check_queue(ticket, key, is_retry)
        if wait := self._quotas.take(ticket.tenant, ticket.cost):
            raise Overloaded(
                f"tenant {ticket.tenant!r} may use {self._quotas.of(ticket.tenant)} tokens a minute, and this request "
                f"asks for {ticket.cost}; send it again in {wait:.1f} s",
                wait,
            )
        booking = self._bookings.find(ticket.tenant, key, is_retry)
        if booking is not None:
            self._bookings.drop(booking)
        self.queue.push(ticket)

    def start(self, ticket: Ticket[T]) -> None:
        """The ticket whose turn it is goes to a rank."""
        self.queue.take(ticket, ticket.cost * self._used.ratio)
        self._num_started += 1
        self.rate.set_busy(True)

    def set_away(self, count: int) -> None:
        """So many tickets that have started are at no rank: what is not served meanwhile says nothing of the rate."""
        self.rate.set_busy(self._num_started > count)

    def withdraw(self, ticket: Ticket[T]) -> None:
        """A ticket that has not started will not."""
        if self.queue.remove(ticket):
            self._quotas.give_back(ticket.tenant, ticket.cost)

    def served(self, tokens: int) -> None:
        """Tokens were computed or drawn for requests that have started."""
        self.rate.add(tokens, self.queue.total > 0)

    def finish(self, ticket: Ticket[T], used: int, is_complete: bool) -> None:
        """A ticket that has started ended after `used` tokens.

        Args:
            is_complete: it came to its own end; else it says nothing about what requests take.
        """
        self._num_started -= 1
        self.rate.set_busy(self._num_started > 0)
        self.queue.settle(ticket, used)
        self._quotas.give_back(ticket.tenant, max(0, ticket.cost - used))
        if is_complete:
            self._used.add(used, ticket.cost)

    def _check_wait(self, ticket: Ticket[T], within_s: float | None) -> None:
        # Until a rate was measured nobody can be told that it would be too late.
        if within_s is None or self.rate.tokens_per_s is None:
            return
        wait = self.queue.tokens_before(ticket.tenant, ticket.priority, ticket.cost) / self.cost_per_s
        if wait > within_s:
            raise Overloaded(
                f"the request would wait about {wait:.1f} s for a rank, longer than the {within_s:.1f} s it has; "
                "send it again later or give it more time",
                min(max(wait - within_s, LEAST_DELAY_S), MOST_DELAY_S),
            )

    def _check_queue(self, ticket: Ticket[T], key: Hashable, is_retry: bool) -> None:
        free = self._limits.max_queued_tokens - self.queue.total
        own, booked = self.queue.tokens_of(ticket.tenant), self._bookings.tokens_of(ticket.tenant)
        booking = self._bookings.find(ticket.tenant, key, is_retry)
        others_booked = booked - (booking.cost if booking is not None else 0)
        if not own and not others_booked and (ticket.cost <= free or not self.queue.total):
            return
        early_s = self._bookings.early_by(booking) if booking is not None else 0.0
        share, before = RETURNING_SHARE, 0
        if booking is None or early_s:
            # As if those who were told to come back were here.
            share, before = NEWCOMERS_SHARE, booked - (booking.cost if booking else 0)
        excess = own + before + ticket.cost - share * (free - before)
        if excess <= 0 or own + ticket.cost <= FILLING_SHARE * free:
            return
        if early_s:
            delay = early_s
        else:
            # While the tenant's own queue shrinks by a token, so do those of the others, and its bound grows by that.
            tenants = self.queue.num_tenants + (not own)
            delay = max(excess * tenants / (1 + share * tenants) / self.cost_per_s * DELAY_MARGIN, LEAST_DELAY_S)
            if booking is not None:  # The rate was misjudged by some part of what it has waited.
                delay = max(delay, booking.delay_s * MISJUDGED_SHARE)
                self._bookings.drop(booking)
            if delay <= MOST_DELAY_S:
                self._bookings.add(ticket.tenant, key, ticket.cost, delay)
        delay = min(delay, MOST_DELAY_S)
        raise Overloaded(
            f"{self.queue.total} tokens wait already, {own} of them this tenant's; send it again in {delay:.1f} s",
            delay,
        )
