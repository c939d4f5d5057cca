"""The order in which waiting requests go to ranks: by priority, then fairly between tenants by tokens served.

Each tenant has a counter of the tokens it was given; the tenant that has had least goes next (virtual token counters,
Sheng et al., 2024). A tenant that was away is not owed what it did not ask for: its counter is lifted to the present.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Ticket(Generic[T]):
    """One request in the queue, or at a rank."""

    item: T
    tenant: str
    priority: int
    """Higher goes first."""
    cost: int
    """Tokens it may take at most: of its prompt and its whole output."""
    charged: float = 0.0
    """Tokens its tenant was charged when it went to a rank."""


class FairQueue(Generic[T]):
    """Waiting tickets. Plain data: no clock, no waiting."""

    def __init__(self) -> None:
        # By priority, then tenant: nothing empty is kept.
        self._lines: dict[int, dict[str, deque[Ticket[T]]]] = {}
        self._tokens: dict[str, int] = {}
        self._served: dict[str, float] = {}
        self._present = 0.0
        self.total = 0
        """Tokens of all tickets here."""

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[Ticket[T]]:
        for tenants in self._lines.values():
            for line in tenants.values():
                yield from line

    @property
    def num_tenants(self) -> int:
        """Tenants with a ticket here."""
        return len(self._tokens)

    def tokens_of(self, tenant: str) -> int:
        """Tokens of a tenant's tickets here."""
        return self._tokens.get(tenant, 0)

    def tokens_before(self, tenant: str, priority: int, cost: int) -> int:
        """Tokens likely to go before a new ticket: all of higher priority, and each tenant's as far as is fair.

        Args:
            cost: tokens of the new ticket.
        """
        higher = sum(_tokens(line) for level, tenants in self._lines.items() if level > priority
                     for line in tenants.values())  # fmt: skip
        same = self._lines.get(priority, {})
        own = _tokens(same.get(tenant, ()))
        return higher + own + sum(min(_tokens(line), own + cost) for name, line in same.items() if name != tenant)

    def push(self, ticket: Ticket[T]) -> None:
        if ticket.tenant not in self._tokens:
            self._served[ticket.tenant] = max(self._served.get(ticket.tenant, 0.0), self._present)
        self._lines.setdefault(ticket.priority, {}).setdefault(ticket.tenant, deque()).append(ticket)
        self._tokens[ticket.tenant] = self.tokens_of(ticket.tenant) + ticket.cost
        self.total += ticket.cost

    def peek(self) -> Ticket[T] | None:
        """The ticket whose turn it is."""
        if not self._lines:
            return None
        tenants = self._lines[max(self._lines)]
        return tenants[min(tenants, key=lambda tenant: self._served[tenant])][0]

    def take(self, ticket: Ticket[T], charge: float) -> None:
        """Removes the ticket whose turn it is, and charges its tenant tokens for it."""
        self._present = max(self._present, self._served[ticket.tenant])
        ticket.charged = charge
        self._served[ticket.tenant] += charge
        self.remove(ticket)

    def remove(self, ticket: Ticket[T]) -> bool:
        """Takes a ticket out of the queue; False if it is not here."""
        line = self._lines.get(ticket.priority, {}).get(ticket.tenant)
        if line is None or ticket not in line:
            return False
        line.remove(ticket)
        self.total -= ticket.cost
        self._tokens[ticket.tenant] -= ticket.cost
        if not line:
            del self._lines[ticket.priority][ticket.tenant]
            if not self._lines[ticket.priority]:
                del self._lines[ticket.priority]
            if not any(ticket.tenant in tenants for tenants in self._lines.values()):
                del self._tokens[ticket.tenant]
                self._forget_idle()
        return True

    def settle(self, ticket: Ticket[T], used: int) -> None:
        """Corrects what a ticket's tenant was charged by what it used, tokens."""
        if ticket.tenant in self._served:
            self._served[ticket.tenant] += used - ticket.charged

    def _forget_idle(self) -> None:
        # Whoever is away and not ahead of the others would be lifted to the present anyway.
        gone = [name for name, had in self._served.items() if name not in self._tokens and had <= self._present]
        for name in gone:
            del self._served[name]


def _tokens(line: "deque[Ticket[T]] | tuple[()]") -> int:
    return sum(ticket.cost for ticket in line)
