"""tests/growth.py: a small axis on the shared server, and where a curve bends; `make growth` is the whole."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.bench_machine import machine
from tests.e2e.serving import ROOT, Server
from tests.growth import bends, failure, make_table, measure, write
from tests.growth_bend import find_bend
from tests.growth_plot import draw
from tests.growth_points import AXES, make_points, short_points

pytestmark = pytest.mark.e2e


async def test_an_axis_is_measured_drawn_and_written(server: Server, tmp_path: Path) -> None:
    told = []
    points = short_points()
    # As a prompt axis too, which is counted otherwise.
    points += [replace(point, axis="prompt", x=point.prompt_tokens) for point in points[:1]]
    measured = await measure(
        server.address, server.metrics, points, rounds=2, seed=1, tell=lambda *what: told.append(what)
    )
    assert [(round_, one.point) for round_, one in told] == [(round_, point) for round_ in range(2) for point in points]
    for one in measured:
        assert (len(one.rounds), len(one.steps), one.median.failed) == (2, 2, 0)
        assert one.median.requests == 2 * one.point.load.requests
        assert min(one.rates) <= one.rate <= max(one.rates)
        # The last token of a request is not computed.
        assert one.all_steps.tokens >= one.median.requests * (16 + 4 - 1)
        assert one.all_steps.seconds > 0
    assert measured[-1].rates[0] == pytest.approx(16e3 / measured[-1].rounds[0].first_token.p50)

    write(tmp_path, measured, machine(), "now", 1)
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    content = json.loads((tmp_path / "growth.json").read_text())
    assert [point["x"] for point in content["points"]] == [1, 2, 4, 8, 16]
    assert content["points"][0]["tokens_per_s"] == pytest.approx(measured[0].rate)
    assert make_table(measured).row_count == 5
    draw(tmp_path / "bent.png", measured, {("streams", ""): find_bend([(1, 1), (2, 2), (4, 4), (8, 4)])}, "")
    assert (tmp_path / "bent.png").stat().st_size > 10_000


async def test_a_point_with_failed_streams_says_so(server: Server) -> None:
    # More than the context of the model holds.
    point = replace(short_points()[0], prompt_tokens=5000)
    (measured,) = await measure(server.address, server.metrics, [point], rounds=1, seed=1, tell=lambda *_: None)
    assert measured.median.failed == 6
    assert failure(measured).startswith("1 stream: 6 of 6 failed: ")
    assert bends([measured]) == {}


@pytest.mark.parametrize("curve", [lambda x: 3 * x, lambda x: 5 / x, lambda x: 7.0])
def test_a_power_of_x_does_not_bend(curve) -> None:
    assert find_bend([(x, curve(x)) for x in (1, 2, 4, 8, 16, 32)]) is None


def test_a_bend_is_found_where_it_is() -> None:
    bend = find_bend([(x, min(100 * x, 800 * (x / 8) ** 0.25)) for x in (1, 2, 4, 8, 16, 32, 64)])
    assert bend is not None
    assert (bend.x, bend.y) == (8, 800)
    assert bend.before == pytest.approx(2)
    assert bend.after == pytest.approx(2**0.25)
    assert bend.sentence == "bends at 8: ×2.00 a doubling before, ×1.19 after"


@pytest.mark.parametrize("points", [[], [(1, 1), (2, 2), (4, 2)], [(1, 1), (2, float("nan")), (4, 4), (8, 4), (16, 4)]])
def test_of_too_little_nothing_is_said(points) -> None:
    assert find_bend(points) is None


def test_the_axes_reach_as_far_as_they_say() -> None:
    points = make_points(AXES, 2)
    ends = {axis: [point.x for point in points if point.axis == axis] for axis in AXES}
    assert {axis: (min(xs), max(xs)) for axis, xs in ends.items()} == {
        "streams": (1, 256),
        "prompt": (128, 32768),
        "experts": (16, 512),
        "ranks": (1, 8),
    }
    assert len({point.server for point in points}) == 6 + 4, "two axes and a point of the ranks axis share a server"
    assert {point.axis for point in make_points(("experts",), 2, {"experts": 64})} == {"experts"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "/nowhere"], "there is no such folder"),
        (["--out", ".", "--axis", "width"], "invalid choice"),
        (["--out", ".", "--axis", "ranks", "--most-ranks", "0"], "nothing to measure"),
    ],
)
def test_bad_arguments_start_nothing(arguments: list[str], said: str) -> None:
    command = [sys.executable, "-m", "tests.growth", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
