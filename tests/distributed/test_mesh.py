"""The exchange between hosts when processes die, fall silent or are told to give up."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from tests.distributed.jobs import Spot
from tests.distributed.processes import context
from workers.prompt_limit import StepWork
from workers.rendezvous import RendezvousStore

HOSTS = {"one host": 1, "two hosts": 2, "own hosts": 8}


def run(spot: Spot, options: dict[str, Any], abort_after_s: float, pipe: Connection) -> None:
    """Exchange rows until that fails; say when and why."""
    torch.set_num_threads(1)
    exchange = spot.exchange(**options)
    pipe.send("ready")
    if abort_after_s:
        threading.Timer(abort_after_s, exchange.abort).start()
    trips = 0
    try:
        while True:
            exchange.agree(StepWork(8))
            process_R = torch.arange(8) % spot.size
            dispatched = exchange.dispatch(torch.ones(8, 64), process_R, process_R)
            exchange.combine(dispatched.x_SD, dispatched)
            trips += 1
    except Exception as error:
        # The monotonic clock is the machine's, so the same for all.
        pipe.send((time.monotonic(), type(error).__name__, str(error), trips))
    exchange.close()


@dataclass
class Running:
    processes: list[Any]
    pipes: list[Connection]

    def ends(self, ranks: list[int], timeout_s: float = 40.0) -> list[tuple[float, str, str, int]]:
        """When and why each failed, and after how many round trips."""
        deadline, found = time.monotonic() + timeout_s, []
        for rank in ranks:
            assert self.pipes[rank].poll(max(0.0, deadline - time.monotonic())), f"rank {rank} goes on for ever"
            found.append(self.pipes[rank].recv())
        return found


@contextmanager
def running(size: int, options: dict[str, Any], aborts: dict[int, float] | None = None) -> Iterator[Running]:
    """Processes that exchange rows without a pause; those in `aborts` give up after so many seconds."""
    store = RendezvousStore("127.0.0.1")
    processes, pipes = [], []
    for index in range(size):
        ours, theirs = context.Pipe()
        arguments = (Spot(store.address, index, size), options, (aborts or {}).get(index, 0.0), theirs)
        process = context.Process(target=run, args=arguments, daemon=True)
        process.start()
        processes.append(process)
        pipes.append(ours)
    try:
        for pipe in pipes:
            assert pipe.poll(60)
            assert pipe.recv() == "ready"
        yield Running(processes, pipes)
    finally:
        for process in processes:
            process.kill()
            process.join(10)
        store.close()


@pytest.mark.parametrize("hosts", HOSTS.values(), ids=HOSTS)
def test_a_killed_rank_ends_the_others_calls(hosts: int) -> None:
    with running(4, {"hosts": hosts}) as gang:
        time.sleep(0.3)
        os.kill(gang.processes[3].pid, signal.SIGKILL)
        killed = time.monotonic()
        for when, kind, sentence, trips in gang.ends([0, 1, 2]):
            assert kind == "ExchangeError"
            # Who notices first leaves, and that may be what another one notices.
            assert sentence.startswith("exchange failed: rank ")
            assert " is gone" in sentence
            assert trips > 0
            assert when - killed < 5


@pytest.mark.parametrize("hosts", HOSTS.values(), ids=HOSTS)
def test_a_stopped_rank_is_named_in_time(hosts: int) -> None:
    with running(3, {"hosts": hosts, "timeout_s": 3.0}) as gang:
        time.sleep(0.3)
        os.kill(gang.processes[2].pid, signal.SIGSTOP)
        stopped = time.monotonic()
        ends = gang.ends([0, 1])
        assert all(kind == "ExchangeError" for _, kind, _, _ in ends)
        first = min(ends)
        assert "rank 2 at 127.0.0." in first[2]
        assert "did not answer within 3 s" in first[2]
        assert 2.5 < first[0] - stopped < 15


@pytest.mark.parametrize("options", [{"hosts": 1}, {"hosts": 2}, {"hosts": 8}, {}], ids=[*HOSTS, "torch"])
def test_aborting_ends_the_call_under_way(options: dict[str, Any]) -> None:
    """A rank is stuck; the others' control threads give up long before the time is over."""
    with running(3, {"timeout_s": 30.0, **options}, aborts={0: 2.0, 1: 2.0}) as gang:
        started = time.monotonic()
        os.kill(gang.processes[2].pid, signal.SIGSTOP)
        for when, kind, sentence, _ in gang.ends([0, 1], 25.0):
            assert kind == "ExchangeError"
            assert "it was aborted" in sentence or " is gone" in sentence
            assert when - started < 20
