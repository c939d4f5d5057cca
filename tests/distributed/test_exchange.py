"""Dispatch and combine between real processes: over Gloo, shared memory, and between hosts."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.distributed.jobs import HIDDEN, Spot, Trip
from tests.distributed.processes import Processes
from workers.rendezvous import RendezvousStore

SIZES = (1, 2, 3, 4, 8)
MODES: dict[str, dict[str, Any]] = {
    "padded": {"padded_limit_bytes": 2**30},
    "counted": {"padded_limit_bytes": 0},
    "shared": {"hosts": 1, "kind": "shared"},
    "2 hosts": {"hosts": 2},
    "3 hosts": {"hosts": 3},
    "own hosts": {"hosts": 8},
}
KINDS: dict[str, dict[str, Any]] = {"torch": {}, "shared": {"hosts": 1, "kind": "shared"}, "2 hosts": {"hosts": 2}}
MOST_ROWS = 40
_names = itertools.count()


@dataclass
class Group:
    """A group that stays open over many examples."""

    processes: Processes
    size: int
    mode: str
    name: str

    def trip(
        self, rows: list[list[tuple[int, int]]], dim: int, dtype: str, seed: int, tokens: int | None = None
    ) -> list[Trip]:
        """rows[p] are process p's: (destination, expert) each."""
        return self.processes.run(
            "jobs:round_trip",
            [
                (
                    self.name,
                    len(mine) if tokens is None else tokens,
                    [process for process, _ in mine],
                    [expert for _, expert in mine],
                    dim,
                    dtype,
                    seed + index,
                )
                for index, mine in enumerate(rows)
            ],
        )


def opened(processes: Processes, size: int, mode: str, rows_per_token: int = 1) -> Iterator[Group]:
    name = f"exchange {next(_names)}"
    store = RendezvousStore("127.0.0.1")
    options = {**MODES[mode], "rows_per_token": rows_per_token}
    processes.run("jobs:open_exchange", [(name, Spot(store.address, index, size), options) for index in range(size)])
    yield Group(processes, size, mode, name)
    processes.run("jobs:close_exchange", [(name,)] * size)
    store.close()


@pytest.fixture(scope="module", params=itertools.product(SIZES, MODES), ids=lambda p: f"{p[0]} processes, {p[1]}")
def group(request: pytest.FixtureRequest, processes: Processes) -> Iterator[Group]:
    yield from opened(processes, *request.param)


def check(group: Group, rows: list[list[tuple[int, int]]], trips: list[Trip], dim: int, item_bytes: int) -> None:
    for index, trip in enumerate(trips):
        assert trip.agreed == [len(mine) for mine in rows]
        assert trip.came_home
        # By the process they come from, and in its order: so what is computed does not depend on the transport.
        assert trip.experts == [expert for mine in rows for process, expert in mine if process == index]
        assert trip.rows_sent == sum(process != index for process, _ in rows[index])
    assert sum(trip.bytes_sent for trip in trips) == sum(trip.bytes_received for trip in trips)
    if group.mode == "counted" and any(rows):
        # A row and its expert's number out, a row back, and once the counts.
        for index, trip in enumerate(trips):
            came = sum(process == index for other, mine in enumerate(rows) if other != index for process, _ in mine)
            counts = 8 * (group.size - 1)
            assert trip.bytes_sent == trip.rows_sent * (dim * item_bytes + 8) + came * dim * item_bytes + counts


@given(
    data=st.data(),
    dim=st.sampled_from([1, 3, 64]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_combine_undoes_dispatch(group: Group, data: st.DataObject, dim: int, dtype: str, seed: int) -> None:
    row = st.tuples(st.integers(0, group.size - 1), st.integers(0, 200))
    rows = [data.draw(st.lists(row, max_size=MOST_ROWS), label=f"rows of {index}") for index in range(group.size)]
    check(group, rows, group.trip(rows, dim, dtype, seed), dim, 4 if dtype == "float32" else 2)


def test_shapes_at_the_edge(group: Group) -> None:
    size = group.size
    cases = [
        # Nobody has any.
        [[] for _ in range(size)],
        # One process has rows, for itself, for another, for all.
        [[(0, 5)] * 9 if index == 0 else [] for index in range(size)],
        [[(size - 1, 5)] * 9 if index == 0 else [] for index in range(size)],
        [[(other, other) for other in range(size)] * 3 if index == size - 1 else [] for index in range(size)],
        # All rows to one.
        [[(size - 1, 127)] * MOST_ROWS for _ in range(size)],
        # None stays where it is.
        [[((index + 1) % size, index)] * (index + 1) for index in range(size)],
    ]
    for rows in cases:
        check(group, rows, group.trip(rows, HIDDEN, "float32", 1), HIDDEN, 4)


def test_many_dispatches_in_one_step(group: Group) -> None:
    """A step has an agreement and as many dispatches as MoE layers, of rows that go elsewhere each time."""
    for seed in range(3):
        rows = [
            [((index * 7 + row * seed) % group.size, row) for row in range(MOST_ROWS - index)]
            for index in range(group.size)
        ]
        check(group, rows, group.trip(rows, HIDDEN, "bfloat16", seed), HIDDEN, 2)


@pytest.mark.parametrize("mode", MODES)
def test_two_experts_a_token(processes: Processes, mode: str) -> None:
    for group in opened(processes, 3, mode, rows_per_token=2):
        rows = [[((index + row) % 3, row % 5) for row in range(2 * 10)] for index in range(3)]
        trips = group.trip(rows, HIDDEN, "float32", 0, tokens=10)
        assert all(trip.came_home and trip.agreed == [10, 10, 10] for trip in trips)


def test_the_mode_follows_the_agreement(processes: Processes) -> None:
    """Few tokens go padded, many counted; the largest decides for all."""
    name, store = "by size", RendezvousStore("127.0.0.1")
    limit = 10 * (HIDDEN * 4 + 8)
    processes.run(
        "jobs:open_exchange",
        [(name, Spot(store.address, index, 2), {"padded_limit_bytes": limit}) for index in range(2)],
    )
    group = Group(processes, 2, "", name)
    for most, padded in ((10, True), (11, False), (1, True)):
        rows = [[(1, 3)], [(0, 4)] * most]
        trips = group.trip(rows, HIDDEN, "float32", most)
        assert all(trip.came_home for trip in trips)
        # Padded, both send as much as the one that has most.
        assert (trips[0].bytes_sent == trips[1].bytes_sent) == padded
        if padded:
            assert trips[0].bytes_sent == most * (HIDDEN * 4 + 8) + most * HIDDEN * 4
    processes.run("jobs:close_exchange", [(name,)] * 2)
    store.close()


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_side_by_side(processes: Processes, store: RendezvousStore, kind: str) -> None:
    """The next epoch's group may be formed while the last one's is in use, with other members in another order."""
    options = KINDS[kind]
    processes.run(
        "jobs:open_exchange", [("old", Spot(store.address, index, 3), {"epoch": 1, **options}) for index in range(3)]
    )
    processes.run(
        "jobs:open_exchange",
        [("new", Spot(store.address, 1 - index, 2), {"epoch": 2, **options}) for index in range(2)],
    )
    assert processes.run("jobs:agree", [("old", index) for index in range(3)]) == [[0, 1, 2]] * 3
    assert processes.run("jobs:agree", [("new", 10 + index) for index in range(2)]) == [[11, 10]] * 2
    processes.run("jobs:close_exchange", [("old",)] * 3)
    assert processes.run("jobs:agree", [("new", index) for index in range(2)]) == [[1, 0]] * 2
    processes.run("jobs:close_exchange", [("new",)] * 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_that_does_not_answer_is_an_error_in_time(
    processes: Processes, store: RendezvousStore, kind: str
) -> None:
    options = {"timeout_s": 3.0, **KINDS[kind]}
    processes.run("jobs:open_exchange", [("slow", Spot(store.address, index, 2), options) for index in range(2)])
    started = time.monotonic()
    ((kind, sentence),) = processes.run("jobs:fail_to_agree", [("slow", 1)])
    assert kind == "ExchangeError"
    assert "exchange failed" in sentence
    assert 2 < time.monotonic() - started < 9
    processes.run("jobs:close_exchange", [("slow",)] * 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_that_leaves_is_an_error_at_once(processes: Processes, store: RendezvousStore, kind: str) -> None:
    processes.run("jobs:open_exchange", [("left", Spot(store.address, index, 3), KINDS[kind]) for index in range(3)])
    processes.run("jobs:close_exchange", [("left",)])
    started = time.monotonic()
    # Processes 1 and 2; process 0 has left and has nothing to do.
    results = processes.run("jobs:fail_to_agree", [("none", 1), ("left", 1), ("left", 1)])
    assert [kind for kind, _ in results[1:]] == ["ExchangeError", "ExchangeError"]
    assert time.monotonic() - started < 5


def test_a_group_that_never_forms_is_an_error_in_time(processes: Processes, store: RendezvousStore) -> None:
    started = time.monotonic()
    ((kind, sentence),) = processes.run("jobs:fail_to_open", [(Spot(store.address, 0, 2), 1.5)])
    assert kind == "ExchangeError"
    assert f"process group of 2 ranks not formed over {store.address} within 2 s" in sentence
    assert time.monotonic() - started < 8


def test_a_store_that_is_not_there_is_an_error_in_time(processes: Processes) -> None:
    store = RendezvousStore("127.0.0.1")
    store.close()
    started = time.monotonic()
    ((kind, sentence),) = processes.run("jobs:fail_to_open", [(Spot(store.address, 0, 2), 1.5)])
    assert kind == "ExchangeError"
    assert store.address in sentence
    assert time.monotonic() - started < 8
