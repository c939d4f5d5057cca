"""`caravan bench` from its flags to its tables and files, against servers on loopback."""

import importlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from cluster import bench_rounds
from cluster.bench import make_plan
from cluster.bench_load import Load
from cluster.bench_rounds import Result
from cluster.bench_steps import RankSteps
from cluster.bench_tables import by_load, steps_table
from cluster.cli import main, make_parser
from tests.unit.cluster.fake_servers import FakeServers
from tests.unit.cluster.test_bench_steps import exposition

SMALL = ("--streams", "1,3", "--prompt-tokens", "8", "--output-tokens", "4", "--rounds", "2")


@pytest.fixture
def fake() -> Iterator[FakeServers]:
    with FakeServers() as servers:
        yield servers


def bench(*arguments: str) -> int:
    return main(["bench", *arguments])


def test_two_servers_take_turns_and_are_compared(fake, tmp_path: Path, capsys) -> None:
    file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    code = bench(
        "--address",
        fake.grpc_address,
        "--against",
        fake.url,
        *SMALL,
        "--seed",
        "5",
        "--json",
        str(file),
        "--png",
        str(picture),
    )
    captured = capsys.readouterr()
    assert code == 0, captured.err
    told = [line.split(":")[0] for line in captured.err.splitlines()]
    one_round = ["1 stream, A", "1 stream, B", "3 streams, A", "3 streams, B"]
    assert told == [f"round {round_} of 2, {what}" for round_ in (1, 2) for what in one_round]
    assert "A/B" in captured.out
    assert "×" in captured.out
    assert "0 of 18" in captured.out, "nine requests a round of three streams"

    content = json.loads(file.read_text())
    assert content["settings"] == {"mix": "random", "prompt_tokens": 8, "output_tokens": 4, "rounds": 2, "seed": 5}
    assert [server["address"] for server in content["servers"]] == [fake.grpc_address, fake.url]
    assert content["machine"]["cores"] >= 1
    assert content["machine"]["cpu"]
    assert content["machine"]["packages"]["grpcio"]
    assert isinstance(content["command"], list)
    results = content["results"]
    assert [(one["load"]["streams"], one["server"]) for one in results] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    for one in results:
        assert len(one["rounds"]) == 2
        assert one["median"]["failed"] == 0
        assert one["median"]["output_tokens"] == 4 * one["median"]["requests"]
        assert one["rounds"][0]["gap"]["p50"] >= 0
    assert [ratio["server"] for ratio in content["ratios"]] == [1, 1]
    expected = results[0]["median"]["output_tokens_per_s"] / results[1]["median"]["output_tokens_per_s"]
    assert content["ratios"][0]["output_tokens_per_s"] == pytest.approx(expected)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000

    assert len({tuple(prompt) for prompt in fake.seen.prompts}) == len(fake.seen.prompts), "both servers' are fresh"
    assert {len(prompt) for prompt in fake.seen.prompts} == {8}


def test_more_loads_than_bars_are_curves(fake, tmp_path: Path) -> None:
    picture = tmp_path / "bench.png"
    streams = ("--streams", "1,2,3,4,5", "--prompt-tokens", "8", "--output-tokens", "2", "--rounds", "1")
    assert bench("--address", fake.url, *streams, "--png", str(picture)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_failed_streams_are_counted_named_and_end_with_1(fake, tmp_path: Path, capsys) -> None:
    fake.behaviour.refuse_every = 6  # The warm-up's four go through.
    file = tmp_path / "bench.json"
    assert bench("--address", fake.url, "--streams", "2", "--rounds", "2", "--json", str(file)) == 1
    captured = capsys.readouterr()
    assert "failed: 2 streams" in captured.err
    assert "HTTP 429: the queue is full" in captured.err
    assert "Traceback" not in captured.err
    assert "2 of 12" in captured.out
    (result,) = json.loads(file.read_text())["results"]
    assert result["median"]["errors"] == {"HTTP 429": 2}
    assert result["median"]["output_tokens"] == 10 * 64
    assert sum(one["failed"] for one in result["rounds"]) == 2


def test_a_server_that_fails_at_once_is_not_measured(fake, capsys) -> None:
    fake.behaviour.shortfall = 1
    assert bench("--address", fake.grpc_address, *SMALL) == 1
    error = capsys.readouterr().err
    assert "the warm-up failed with short: the stream ended with 3 of 4 tokens" in error
    assert error.count("\n") == 1


def test_an_open_load(fake, capsys) -> None:
    assert bench("--address", fake.grpc_address, "--rate", "40,80", "--seconds", "0.3", "--rounds", "1") == 0
    out = capsys.readouterr().out
    assert "40/s" in out
    assert "80/s" in out


def test_long_prompts(fake, tmp_path: Path, capsys) -> None:
    file = tmp_path / "bench.json"
    fake.behaviour.step_s = 0.002
    mix = ("--mix", "long-prompt:700", "--streams", "2", "--rounds", "1", "--output-tokens", "8")
    assert bench("--address", fake.grpc_address, *mix, "--json", str(file)) == 0
    assert "while long prompts arrive" in capsys.readouterr().out
    long = json.loads(file.read_text())["results"][0]["median"]["long"]
    assert long["count"] == 6
    assert long["stretch"] == pytest.approx(long["gap"]["p99"] / long["calm_gap"]["p50"])
    assert {len(prompt) for prompt in fake.seen.prompts} == {128, 700}


def test_a_shared_prefix_is_shared_within_a_measurement(fake) -> None:
    assert bench("--address", fake.grpc_address, "--mix", "shared-prefix:100", "--streams", "2", "--rounds", "2") == 0
    prefixes = [tuple(prompt[:100]) for prompt in fake.seen.prompts[4:]]
    assert len(set(prefixes[:6])) == len(set(prefixes[6:])) == 1
    assert prefixes[0] != prefixes[6]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--prompt-tokens", "990"], 2, "up to 1054 tokens of prompt and output, but the context of fake is 1000"),
        (["--mix", "long-prompt"], 2, "up to 8256 tokens"),
        (["--mix", "other"], 2, "--mix: must be random"),
        (["--streams", "0"], 2, "--streams: must be from 1"),
        (["--streams", "1,,2"], 2, "--streams: must be a whole number, got ''"),
        (["--rate", "nan"], 2, "--rate: must be greater than 0"),
        (["--rate", "-1"], 2, "--rate"),
        (["--rate", "1", "--streams", "2"], 2, "give one of them"),
        (["--rate", "1", "--mix", "long-prompt:9"], 2, "needs running streams"),
        (["--seconds", "x"], 2, "--seconds: must be a number"),
        (["--rounds", "0"], 2, "--rounds: must be at least 1"),
        (["--against", "ftp://host:1"], 2, "--against: must be HOST:PORT or http://HOST:PORT"),
        (["--against", "http://host:port"], 2, "--against: must be HOST:PORT or http://HOST:PORT"),
        (["--against", "host"], 2, "--against: must be HOST:PORT"),
        (["--against", "127.0.0.1:1"], 1, "no server answers at 127.0.0.1:1"),
        (["--json", "/nowhere/x.json"], 2, "there is no folder /nowhere"),
        (["--png", "/tmp"], 2, "is a folder"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_sent(fake, arguments: list[str], code: int, says: str, capsys) -> None:
    assert bench("--address", fake.grpc_address, *arguments) == code
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.startswith("caravan: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert fake.seen.prompts == []


def test_without_matplotlib_a_sentence_says_what_to_install(fake, monkeypatch, capsys) -> None:
    monkeypatch.delitem(sys.modules, "cluster.bench_plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    assert bench("--address", fake.grpc_address, "--png", "/tmp/x.png") == 2
    error = capsys.readouterr().err
    assert "pip install caravan[bench]" in error
    assert "matplotlib" in error
    assert fake.seen.prompts == []


def test_defaults_are_the_common_load() -> None:
    plan = make_plan(make_parser().parse_args(["bench"]))
    assert [(load.streams, load.requests) for load in plan.loads] == [(1, 6), (8, 24), (64, 128)]
    assert (plan.shape.prompt_tokens, plan.shape.output_tokens, plan.rounds) == (128, 64, 3)
    assert plan.shape.mix.kind == "random"
    assert make_plan(make_parser().parse_args(["bench"])).seed != plan.seed, "fresh"


def test_bench_imports_neither_ray_nor_torch_nor_what_is_optional() -> None:
    for name in [name for name in sys.modules if name.startswith("cluster.bench")]:
        source = importlib.import_module(name).__file__
        assert source is not None
        text = Path(source).read_text()
        optional = {"bench_plot": ("matplotlib",), "bench_http": ("aiohttp",)}.get(Path(source).stem, ())
        for library in {"ray", "torch", "matplotlib", "aiohttp", "numpy"} - set(optional):
            assert f"import {library}" not in text
            assert f"from {library}" not in text


def test_where_the_step_goes(fake, monkeypatch, tmp_path: Path, capsys) -> None:
    scrapes = iter(
        [
            exposition((1.0, 10, 100, {"experts": 0.5, "other": 0.1}), (1.0, 10, 0, {"experts": 0.2})),
            exposition((3.0, 30, 500, {"experts": 2.0, "exchange": 0.4, "other": 0.2}), (2.0, 20, 0, {"experts": 0.3})),
        ]
    )
    monkeypatch.setattr(bench_rounds, "metrics_url", lambda address, servers: "http://metrics")
    monkeypatch.setattr(bench_rounds, "scrape", lambda url: next(scrapes))
    file = tmp_path / "bench.json"
    assert bench("--address", fake.grpc_address, "--streams", "1", "--rounds", "1", "--json", str(file)) == 0
    out = capsys.readouterr().out
    assert "where the step goes: 1 stream, server A" in out
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in out.splitlines()
        if "│" in line
    }
    assert rows["experts"] == ["53.333", "75.0%", "10.0%"]
    assert rows["exchange"] == ["13.333", "20.0%", "0.0%"]
    assert rows["explained"] == ["", "95.0%", "10.0%"]
    assert rows["tokens a step"] == ["", "20.0", "0.0"]
    (steps, other) = json.loads(file.read_text())["results"][0]["steps"]
    assert steps["parts_seconds"] == pytest.approx({"experts": 1.5, "exchange": 0.4, "other": 0.1})
    assert steps["explained"] == pytest.approx(0.95)
    assert other["seconds"] == 1.0


def test_ranks_of_several_gangs_are_told_apart() -> None:
    steps = {(gang, str(rank)): RankSteps(1.0, 10, 5, {"experts": 1.0}) for gang in "ab" for rank in (10, 2)}
    result = Result(Load(streams=1), 0, steps=[steps, {("a", "99"): RankSteps()}])
    console = Console(file=io.StringIO(), width=100)
    console.print(steps_table(result))
    (header,) = [line for line in console.file.getvalue().splitlines() if "part" in line]
    assert header.replace("┃", " ").split() == ["part", "ms", "a", "step", "a", "2", "a", "10", "b", "2", "b", "10"]


def test_results_of_a_load_belong_together() -> None:
    results = [Result(Load(streams=n), server) for n in (1, 8) for server in (0, 1)]
    assert by_load(results) == [results[:2], results[2:]]
