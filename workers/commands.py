"""What a rank's leader has said and the rank has not done yet; how it cuts short what the rank is at."""

import logging
import threading
from collections.abc import Callable

from protos import gang_pb2
from workers.inbox import Inbox

log = logging.getLogger(__name__)

Command = gang_pb2.Epoch | gang_pb2.Prepare | gang_pb2.Stop


class Commands:
    """Thread-safe. One thread takes what others put.

    Stop comes before everything and stays. Of epochs only the newest counts: those that it overtook are never entered,
    and one no newer than the last is refused. An epoch makes up for a Prepare that waits.

    An epoch or a stop that comes *interrupts*: the engine leaves its epoch, and what `attach` was given last is called.
    That is over with the next `take`, which is one with what it takes, so no interruption can hit the epoch it is for.
    """

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._condition = threading.Condition()
        self._stop: gang_pb2.Stop | None = None
        self._epoch: gang_pb2.Epoch | None = None
        self._prepare: gang_pb2.Prepare | None = None
        self._newest = 0
        self._abort: Callable[[], None] | None = None

    def put(self, command: Command) -> None:
        with self._condition:
            match command:
                case gang_pb2.Stop():
                    self._stop = command
                    self._inbox.stop()
                case gang_pb2.Epoch():
                    if command.epoch <= self._newest:
                        log.warning("epoch %d is refused: epoch %d has begun", command.epoch, self._newest)
                        return
                    self._epoch, self._newest = command, command.epoch
                    self._inbox.interrupt()
                case _:
                    self._prepare = command
            if self._is_interrupted and self._abort is not None:
                self._abort()
            self._condition.notify_all()

    def take(self, timeout_s: float | None = None) -> Command:
        """What is to be done next; waits until there is something.

        Raises:
            TimeoutError: nothing came.
        """
        with self._condition:
            if not self._condition.wait_for(lambda: self._stop or self._epoch or self._prepare, timeout_s):
                raise TimeoutError(f"the leader said nothing within {timeout_s:g} s")
            if self._stop is not None:
                return self._stop
            self._abort = None
            command = self._epoch or self._prepare
            assert command is not None
            self._epoch = self._prepare = None
            self._inbox.resume()
            return command

    @property
    def is_interrupted(self) -> bool:
        """Whether what was taken last is to be left for something newer."""
        with self._condition:
            return self._is_interrupted

    def attach(self, abort: Callable[[], None]) -> None:
        """An interruption calls `abort`, which must not wait, from any thread; now, if it came already. Replaces what
        was attached before; the next `take` detaches it."""
        with self._condition:
            self._abort = abort
            if self._is_interrupted:
                abort()

    def detach(self) -> None:
        """What was attached is not called any more, nor is such a call under way."""
        with self._condition:
            self._abort = None

    @property
    def _is_interrupted(self) -> bool:
        return self._stop is not None or self._epoch is not None
