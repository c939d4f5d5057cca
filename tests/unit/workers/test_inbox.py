"""An engine waits in its inbox, and only there."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from workers.inbox import Abort, Inbox, RouterGone

MESSAGE = Abort(("a", 1))


class Parked:
    """A thread that parks for `step`."""

    def __init__(self, inbox: Inbox, step: int) -> None:
        self.result: bool | None = None
        self.cpu_seconds = 0.0

        def park() -> None:
            before = time.thread_time()
            self.result = inbox.park(step)
            self.cpu_seconds = time.thread_time() - before

        self._thread = threading.Thread(target=park, daemon=True)
        self._thread.start()

    def returned(self, within_s: float) -> bool:
        self._thread.join(within_s)
        return not self._thread.is_alive()


@contextmanager
def parked(inbox: Inbox, step: int = 5) -> Iterator[Parked]:
    thread = Parked(inbox, step)
    assert not thread.returned(0.05), "did not wait"
    try:
        yield thread
    finally:
        inbox.stop()
        assert thread.returned(5)


@pytest.mark.parametrize(
    ("event", "wakes_peers"),
    [
        (lambda inbox: inbox.put(MESSAGE), True),
        (lambda inbox: inbox.put(RouterGone("a")), True),
        (lambda inbox: inbox.wake(0, 5), False),
        (lambda inbox: inbox.wake(0, 6), False),
        (lambda inbox: inbox.stop(), False),
    ],
)
def test_what_ends_the_wait(event: Callable[[Inbox], None], wakes_peers: bool) -> None:
    inbox = Inbox()
    with parked(inbox) as thread:
        event(inbox)
        assert thread.returned(5)
        assert thread.result is wakes_peers


def test_wakes_of_steps_that_are_over_change_nothing() -> None:
    inbox = Inbox()
    inbox.wake(0, 4)
    with parked(inbox, step=5) as thread:
        inbox.wake(0, 3)
        inbox.wake(0, 4)
        assert not thread.returned(0.1)
        inbox.wake(0, 5)
        assert thread.returned(5)


@pytest.mark.parametrize(
    ("before", "result"),
    [
        (lambda inbox: inbox.put(MESSAGE), True),
        (lambda inbox: inbox.wake(0, 5), False),
        # A peer has opened the step already: it has woken everyone.
        (lambda inbox: (inbox.put(MESSAGE), inbox.wake(0, 5)), False),
        # The wake was of an older step: this rank's own work still has to wake the others.
        (lambda inbox: (inbox.put(MESSAGE), inbox.wake(0, 4)), True),
    ],
)
def test_what_came_before_the_wait_is_not_lost(before: Callable[[Inbox], object], result: bool) -> None:
    inbox = Inbox()
    before(inbox)
    assert inbox.park(5) is result


def test_messages_keep_their_order_and_come_once() -> None:
    inbox = Inbox()
    messages = [Abort(("a", number)) for number in range(100)]
    for message in messages:
        inbox.put(message)
    assert inbox.drain() == messages
    assert inbox.drain() == []


def test_messages_of_many_threads_all_arrive() -> None:
    inbox = Inbox()
    threads = [
        threading.Thread(target=lambda router=name: [inbox.put(Abort((router, n))) for n in range(500)])
        for name in "abcd"
    ]
    got: list[Abort] = []
    for thread in threads:
        thread.start()
    while len(got) < 2000:
        inbox.park(10**9)
        got += inbox.drain()
    for thread in threads:
        thread.join()
    for name in "abcd":
        assert [message.key[1] for message in got if message.key[0] == name] == list(range(500))


def test_a_parked_thread_burns_no_cpu() -> None:
    inbox = Inbox()
    with parked(inbox) as thread:
        time.sleep(0.5)
        inbox.wake(0, 5)
        assert thread.returned(5)
    assert thread.cpu_seconds < 0.01


def test_stop_stays() -> None:
    inbox = Inbox()
    assert not inbox.stopped
    inbox.stop()
    assert inbox.stopped
    assert inbox.park(1) is False


def test_an_interruption_ends_the_wait_and_holds_until_resume() -> None:
    inbox = Inbox()
    with parked(inbox) as thread:
        inbox.interrupt()
        assert thread.returned(5)
        assert thread.result is False
    inbox = Inbox()
    inbox.put(MESSAGE)
    inbox.interrupt()
    assert inbox.interrupted and not inbox.stopped
    # With work, too: nobody is woken for an epoch that is over.
    assert inbox.park(1) is False
    inbox.resume()
    assert not inbox.interrupted
    assert inbox.park(1) is True
    assert inbox.drain() == [MESSAGE], "a message was lost"


def test_resume_does_not_undo_stop() -> None:
    inbox = Inbox()
    inbox.stop()
    inbox.resume()
    assert inbox.interrupted
    assert inbox.park(1) is False


def test_a_late_wake_of_the_epoch_before_changes_nothing() -> None:
    inbox = Inbox()
    inbox.enter(1)
    inbox.wake(1, 700)
    inbox.enter(2)
    with parked(inbox, step=2) as thread:
        inbox.wake(1, 701)
        assert not thread.returned(0.05), "it would open a step that nobody else does"
        inbox.wake(2, 2)
        assert thread.returned(5)


def test_an_early_wake_waits_for_its_epoch() -> None:
    inbox = Inbox()
    inbox.enter(1)
    inbox.wake(2, 2)
    with parked(inbox, step=2):
        pass
    inbox = Inbox()
    inbox.enter(1)
    inbox.wake(2, 2)
    inbox.enter(2)
    inbox.wake(1, 9)
    assert inbox.park(2) is False
    inbox.put(MESSAGE)
    assert inbox.park(3) is True
