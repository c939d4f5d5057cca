"""When a client tries again, and how long it waits before."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from protos.errors import CaravanError

JITTER = 0.1
"""Most that is added to a delay the server asks for, as a share of it: refused together must not be back together."""


@dataclass(frozen=True)
class Retries:
    """How often and how long a client tries again."""

    attempts: int = 5
    """Tries in a row without a token, the first included; 1: never again."""
    first_pause_s: float = 0.1
    """Bound of the pause after the first failure; it doubles from one to the next."""
    longest_pause_s: float = 5.0
    """Bound of any such pause."""
    longest_wait_s: float = 60.0
    """Seconds of waiting that the server may ask for in all; a refusal that asks for more is final."""


NO_RETRIES = Retries(attempts=1)


class Patience:
    """What is left of the patience with one request.

    Args:
        retries: how much there is.
        timeout_s: seconds the request has in all; None: no bound.
        sleep: waits for seconds.
    """

    def __init__(self, retries: Retries, timeout_s: float | None, sleep: Callable[[float], None] = time.sleep) -> None:
        self._retries = retries
        self._sleep = sleep
        self._end = None if timeout_s is None else time.monotonic() + timeout_s
        self._waited_s = 0.0
        self.failures = 0
        """In a row, without a token between them."""

    @property
    def left_s(self) -> float | None:
        """Seconds until the request's own deadline, at least 0; None: it has none."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def progress(self) -> None:
        """A token came."""
        self.failures = 0

    def wait(self, error: CaravanError) -> bool:
        """Waits until the request may be sent again; False, at once, when it should not be."""
        self.failures += 1
        if self.failures >= self._retries.attempts:
            return False
        if error.code == grpc.StatusCode.UNAVAILABLE:
            pause = min(self._retries.first_pause_s * 2 ** (self.failures - 1), self._retries.longest_pause_s)
            pause *= random.uniform(0.5, 1)
        elif error.code == grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_after_s is not None:
            pause = error.retry_after_s * random.uniform(1, 1 + JITTER)
            self._waited_s += pause
            if self._waited_s > self._retries.longest_wait_s:
                return False
        else:
            return False
        left_s = self.left_s
        if left_s is not None and pause >= left_s:
            return False
        self._sleep(pause)
        return True
