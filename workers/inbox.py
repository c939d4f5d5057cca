"""What reaches an engine from outside: submissions, aborts, wakes, the end. While idle its thread waits here alone."""

import threading
from collections import deque
from dataclasses import dataclass

from workers.sequence import Sequence, SequenceKey


@dataclass(frozen=True)
class Add:
    sequence: Sequence


@dataclass(frozen=True)
class Abort:
    key: SequenceKey


@dataclass(frozen=True)
class RouterGone:
    router: str


@dataclass(frozen=True)
class Cancel:
    """Ends what other routers than `router` submitted of a request."""

    router: str
    tenant: str
    request_id: str
    sibling: int | None
    """Only this output of it; None: all of them."""


Message = Add | Abort | RouterGone | Cancel


class Inbox:
    """Thread-safe. A parked engine burns no CPU."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._messages: deque[Message] = deque()
        self._wake_step = 0
        self._stopped = False

    def put(self, message: Message) -> None:
        with self._condition:
            self._messages.append(message)
            self._condition.notify()

    def wake(self, step: int) -> None:
        """A peer opens `step`. Wakes of steps that are over change nothing."""
        with self._condition:
            self._wake_step = max(self._wake_step, step)
            self._condition.notify()

    def stop(self) -> None:
        with self._condition:
            self._stopped = True
            self._condition.notify()

    @property
    def stopped(self) -> bool:
        return self._stopped

    def drain(self) -> list[Message]:
        """Everything that has come, without waiting."""
        with self._condition:
            messages = list(self._messages)
            self._messages.clear()
            return messages

    def park(self, step: int) -> bool:
        """Wait until there is a message, a peer opens `step` or later, or the end.

        Returns:
            True if this rank itself has something to do, so that its peers must be woken.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._messages or self._wake_step >= step or self._stopped)
            return self._wake_step < step and bool(self._messages)
