"""A short run of tests/chaos.py; `make chaos` is the long one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import Plan, end, make_chaos, progress_bar, start
from tests.chaos_report import judge, tabulate
from tests.chaos_schedule import SHORT_DECK
from tests.e2e.serving import Server

pytestmark = pytest.mark.e2e

# The machine that tests run on has other work.
FACTOR = 5.0
PLAN = Plan(
    seed=7, streams=24, events=len(SHORT_DECK), at_a_time=8, requests=8, calm_rounds=1, deck=SHORT_DECK
)  # fmt: skip


@pytest.fixture
def four_ranks(tmp_path: Path) -> Iterator[Server]:
    server = start(tmp_path / "server")
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill_all()


@pytest.mark.timeout(300)
def test_nobody_notices_what_is_killed(four_ranks: Server) -> None:
    with progress_bar() as progress:
        seen = make_chaos(four_ranks, PLAN, progress)
    end(four_ranks, seen)
    print("\n".join(line for struck in seen.struck for line in struck.log))
    assert judge(seen, FACTOR) == []
    assert len(seen.told) >= PLAN.streams
    assert [struck.event.kind for struck in seen.struck[: PLAN.events]].count(SHORT_DECK[0]) == 1
    # It was under load: streams lost their ranks, and somebody saw it.
    assert any(cost.moved for cost in seen.costs())
    assert tabulate(seen, FACTOR).row_count == len(SHORT_DECK)
