"""Fixtures of tests that compare with the reference implementation: small checkpoints, written once a session, and the
count of what the exactness rule excused. A folder's conftest.py imports them."""

from collections.abc import Iterator

import pytest
import torch

from tests.checkpoints import MAVERICK, SCOUT, write
from tests.exactness import Exactness, Reference, Written

__all__ = ["exactness", "maverick", "one_thread", "pytest_terminal_summary", "scout"]

_exactness = Exactness()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def maverick(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("maverick")
    return Written(folder, Reference(write(folder, MAVERICK)))


@pytest.fixture(scope="session")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("scout")
    return Written(folder, Reference(write(folder, SCOUT)))


@pytest.fixture(scope="session")
def exactness() -> Iterator[Exactness]:
    yield _exactness
    _exactness.verify()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _exactness.compared:
        terminalreporter.write_line(_exactness.summary)
        for sentence in _exactness.excused:
            terminalreporter.write_line(f"  {sentence}")
        # Each folder's conftest has this hook; one of them is enough.
        _exactness.compared, _exactness.excused = 0, []
