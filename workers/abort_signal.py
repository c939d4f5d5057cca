"""A word that ends waiting: whoever waits on sockets waits for it too."""

import os
import select
import socket
import threading
import time


class AbortedError(Exception):
    """The wait was given up by another thread."""


class AbortSignal:
    """Set once, from any thread; an open descriptor that poll finds readable from then on."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.is_set = False
        self._lock = threading.Lock()

    def set(self) -> None:
        with self._lock:
            self.is_set = True
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Nobody waits any more; setting it does nothing from now on."""
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
            self.fd = -1

    def wait(self, events: dict[socket.socket, int], deadline: float) -> dict[socket.socket, int]:
        """Wait until a socket has one of the poll events asked for; what each has. Empty once `deadline` (of
        time.monotonic) is past.

        Raises:
            AbortedError: the signal was set.
        """
        watch = select.poll()
        watch.register(self.fd, select.POLLIN)
        by_fd = {sock.fileno(): sock for sock in events}
        for sock, wanted in events.items():
            watch.register(sock, wanted)
        found = dict(watch.poll(max(0.0, deadline - time.monotonic()) * 1000))
        if self.fd in found:
            raise AbortedError("given up")
        return {by_fd[fd]: seen for fd, seen in found.items()}
