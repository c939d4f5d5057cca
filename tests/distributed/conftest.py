"""One pool of processes for all tests of this folder, checkpoints and the exactness rule."""

from collections.abc import Iterator

import pytest

from tests.distributed.processes import Processes
from tests.written import exactness, maverick, one_thread, pytest_terminal_summary, scout
from workers.rendezvous import RendezvousStore

__all__ = ["exactness", "maverick", "one_thread", "processes", "pytest_terminal_summary", "scout", "store"]

MOST_PROCESSES = 8


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    pool = Processes(MOST_PROCESSES)
    yield pool
    pool.close()


@pytest.fixture
def store() -> Iterator[RendezvousStore]:
    store = RendezvousStore("127.0.0.1")
    yield store
    store.close()
