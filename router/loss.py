"""Why streams have to leave a rank."""

from dataclasses import dataclass
from enum import StrEnum


class LossReason(StrEnum):
    """The label of the metric."""

    CONNECTION = "connection"
    """The way to the rank broke: it died, or the network did."""
    DEAD = "dead"
    """The leader's view: the rank is dead or replaced, or its gang failed."""
    REFUSED = "refused"
    """The rank is in another epoch than the submission."""
    GIVEN_UP = "given_up"
    """The rank cannot go on with it."""
    FENCED = "fenced"
    """Tokens were dropped because they were not current."""
    SHUTDOWN = "shutdown"
    """The router itself ends; nothing is replayed."""


@dataclass(frozen=True)
class Loss:
    """One event; it may concern many streams."""

    reason: LossReason
    detail: str
    """One clause for a person."""
