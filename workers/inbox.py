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
        self._epoch = 0
        self._woken = 0, 0
        """The newest step, with its epoch before it, that a peer opened."""
        self._stopped = False
        self._interrupted = False

    def put(self, message: Message) -> None:
        with self._condition:
            self._messages.append(message)
            self._condition.notify()

    def wake(self, epoch: int, step: int) -> None:
        """A peer opens `step` of an epoch. Wakes of steps that are over change nothing, however late they come; one of
        an epoch that has not begun here waits for it."""
        with self._condition:
            self._woken = max(self._woken, (epoch, step))
            self._condition.notify()

    def stop(self) -> None:
        with self._condition:
            self._stopped = True
            self._condition.notify()

    def interrupt(self) -> None:
        """The epoch is over: the engine is to leave it, parked or not. Holds until `resume`."""
        with self._condition:
            self._interrupted = True
            self._condition.notify()

    def resume(self) -> None:
        """No more interrupted. Messages wait where they are."""
        with self._condition:
            self._interrupted = False

    def enter(self, epoch: int) -> None:
        """Another epoch begins; its steps are counted anew."""
        with self._condition:
            self._epoch = epoch

    @property
    def stopped(self) -> bool:
        return self._stopped

    @property
    def interrupted(self) -> bool:
        """Stopped counts too."""
        return self._interrupted or self._stopped

    def drain(self) -> list[Message]:
        """Everything that has come, without waiting."""
        with self._condition:
            messages = list(self._messages)
            self._messages.clear()
            return messages

    def park(self, step: int) -> bool:
        """Wait until there is a message, a peer opens `step` of this epoch or a later one, or the end.

        Returns:
            True if this rank itself has something to do, so that its peers must be woken.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._messages or self._is_woken(step) or self.interrupted)
            return bool(self._messages) and not self._is_woken(step) and not self.interrupted

    def _is_woken(self, step: int) -> bool:
        epoch, woken = self._woken
        return epoch == self._epoch and woken >= step
