"""A leader's commands at any moment: none is lost, the newest counts, and none interrupts what it asks for."""

import random
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import gang_pb2
from workers.commands import Commands
from workers.inbox import Inbox

PREPARE = gang_pb2.Prepare()
STOP = gang_pb2.Stop(reason="test")


def epoch(number: int) -> gang_pb2.Epoch:
    return gang_pb2.Epoch(epoch=number)


class Aborts:
    """Counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def test_nothing_said_is_a_timeout() -> None:
    with pytest.raises(TimeoutError, match=r"said nothing within 0\.01 s"):
        Commands(Inbox()).take(0.01)


def test_a_command_does_not_interrupt_what_it_asks_for() -> None:
    inbox = Inbox()
    commands = Commands(inbox)
    commands.put(epoch(1))
    assert commands.is_interrupted and inbox.interrupted
    assert commands.take() == epoch(1)
    abort = Aborts()
    commands.attach(abort)
    assert not commands.is_interrupted and not inbox.interrupted and not abort.count
    commands.put(PREPARE)
    assert not commands.is_interrupted and not abort.count, "preparing waits"
    commands.put(epoch(2))
    assert commands.is_interrupted and inbox.interrupted and abort.count == 1
    assert commands.take() == epoch(2)
    commands.put(epoch(3))
    assert abort.count == 1, "what was attached in the epoch before is called no more"


def test_what_is_attached_too_late_is_called_at_once() -> None:
    commands = Commands(Inbox())
    commands.put(epoch(1))
    commands.take()
    commands.put(epoch(2))
    joining, exchange = Aborts(), Aborts()
    commands.attach(joining)
    commands.attach(exchange)
    assert (joining.count, exchange.count) == (1, 1)


def test_what_is_detached_is_not_called() -> None:
    commands, abort = Commands(Inbox()), Aborts()
    commands.attach(abort)
    commands.detach()
    commands.put(STOP)
    assert not abort.count


def test_stop_comes_first_and_stays() -> None:
    inbox = Inbox()
    commands, abort = Commands(inbox), Aborts()
    commands.attach(abort)
    for command in (epoch(1), STOP, epoch(2), PREPARE):
        commands.put(command)
    assert abort.count >= 1 and inbox.stopped
    for _ in range(3):
        assert commands.take(0) == STOP
    assert commands.is_interrupted and inbox.interrupted


def test_epochs_that_were_overtaken_and_old_ones_are_never_entered() -> None:
    commands = Commands(Inbox())
    for number in (1, 3, 2):
        commands.put(epoch(number))
    assert commands.take() == epoch(3)
    commands.put(epoch(3))
    commands.put(epoch(2))
    assert not commands.is_interrupted
    with pytest.raises(TimeoutError):
        commands.take(0)


@pytest.mark.parametrize("commands_", [[PREPARE, epoch(4)], [epoch(4), PREPARE]], ids=["before", "after"])
def test_an_epoch_makes_up_for_a_prepare(commands_: list[gang_pb2.Prepare | gang_pb2.Epoch]) -> None:
    commands = Commands(Inbox())
    for command in commands_:
        commands.put(command)
    assert commands.take() == epoch(4)
    with pytest.raises(TimeoutError):
        commands.take(0)


@given(st.lists(st.one_of(st.integers(1, 9).map(epoch), st.just(PREPARE), st.just(None)), max_size=30))
def test_what_is_taken_last_is_the_newest(said: list[gang_pb2.Epoch | gang_pb2.Prepare | None]) -> None:
    """None takes."""
    commands, newest, taken = Commands(Inbox()), 0, [0]
    for command in [*said, None]:
        if command is not None:
            commands.put(command)
            newest = max(newest, command.epoch if isinstance(command, gang_pb2.Epoch) else 0)
            assert commands.is_interrupted == (newest > taken[-1])
            continue
        try:
            found = commands.take(0)
        except TimeoutError:
            continue
        if isinstance(found, gang_pb2.Epoch):
            assert found.epoch == newest > taken[-1]
            taken.append(found.epoch)
        assert not commands.is_interrupted
    assert taken[-1] == newest


def test_none_is_lost_between_threads() -> None:
    """The engine leaves an epoch only when it is interrupted, as in a parked gang: one lost word and it hangs."""
    inbox = Inbox()
    commands, last, entered = Commands(inbox), 3000, []

    def engine() -> None:
        while not isinstance(command := commands.take(10), gang_pb2.Stop):
            assert isinstance(command, gang_pb2.Epoch)
            entered.append(command.epoch)
            ended = threading.Event()
            commands.attach(ended.set)
            assert ended.wait(10), f"nothing ended epoch {command.epoch}"
            assert inbox.interrupted
            assert commands.is_interrupted
            commands.detach()

    thread = threading.Thread(target=engine, daemon=True)
    thread.start()
    chance = random.Random(1)
    for number in range(1, last + 1):
        commands.put(epoch(number))
        if chance.random() < 0.3:
            time.sleep(chance.choice([0, 1e-5, 1e-4]))
    deadline = time.monotonic() + 10
    while entered[-1:] != [last] and time.monotonic() < deadline:
        time.sleep(0.001)
    commands.put(STOP)
    thread.join(10)
    assert not thread.is_alive()
    assert entered == sorted(set(entered)) and entered[-1] == last
