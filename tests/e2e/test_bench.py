"""`caravan bench` on a real server: through both doors, against itself, and its step times."""

import json
from pathlib import Path

import pytest

from tests.e2e.serving import Server

pytestmark = pytest.mark.e2e
SMALL = ("--streams", "2", "--prompt-tokens", "32", "--output-tokens", "8", "--rounds", "1")


@pytest.fixture(scope="module")
def content(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """gRPC, with HTTP beside it."""
    folder: Path = tmp_path_factory.mktemp("bench")
    against = ("--against", f"http://{server.http}", "--against", server.address)
    files = ("--json", str(folder / "bench.json"), "--png", str(folder / "bench.png"))
    done = server.caravan("bench", *SMALL, *against, *files)
    assert done.returncode == 0, done.stderr
    assert "A/B" in done.stdout
    assert (folder / "bench.png").stat().st_size > 10_000
    return json.loads((folder / "bench.json").read_text())


def test_both_doors_and_the_server_itself_are_measured(server: Server, content: dict) -> None:
    assert [one["address"] for one in content["servers"]] == [server.address, f"http://{server.http}", server.address]
    assert {one["model"] for one in content["servers"]} == {"nano"}
    assert {one["tokens_end"] for one in content["servers"]} == {4000}, "the vocabulary has 4096"
    assert len(content["results"]) == 3
    for result in content["results"]:
        median = result["median"]
        assert (median["requests"], median["failed"], median["output_tokens"]) == (6, 0, 48)
        assert 0 < median["first_token"]["p50"] <= median["first_token"]["p99"]
        assert 0 < median["gap"]["p50"] <= median["gap"]["p99"] < median["end_to_end"]["p99"]
        assert median["output_tokens_per_s"] == pytest.approx(48 / median["seconds"])
    assert all(0 < one["output_tokens_per_s"] < 100 for one in content["ratios"])


def test_the_ranks_say_how_their_steps_went(server: Server, content: dict) -> None:
    assert {one["metrics"] for one in content["servers"]} == {f"http://{server.metrics}/metrics"}
    for result in content["results"]:
        assert {steps["rank"] for steps in result["steps"]} == {"0", "1", "2", "3"}
        assert sum(steps["tokens"] for steps in result["steps"]) >= 6 * (32 + 7)
        assert all(steps["seconds"] > 0 and steps["steps"] >= 8 for steps in result["steps"])


def test_what_the_context_cannot_hold_is_refused_before_it_is_sent(server: Server) -> None:
    address = ("--address", f"http://{server.http}")
    done = server.caravan("bench", *address, "--mix", "long-prompt:5000")
    assert done.returncode == 2
    assert "the context of nano is 2048" in done.stderr


def test_mixes_and_open_loads(server: Server) -> None:
    done = server.caravan("bench", *SMALL, "--mix", "long-prompt:300")
    assert done.returncode == 0, done.stderr
    assert "while long prompts arrive" in done.stdout
    opened = ("--rate", "8", "--seconds", "1", "--rounds", "1", "--output-tokens", "4", "--seed", "1")
    done = server.caravan("bench", *opened, "--mix", "shared-prefix")
    assert done.returncode == 0, done.stderr
    assert "8/s" in done.stdout
