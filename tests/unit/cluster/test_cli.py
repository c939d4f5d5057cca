"""The command line: what is accepted, exit codes, one line on stderr, and a quick start."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest

from cluster.cli import main, make_parser
from protos import inference_pb2, inference_pb2_grpc


class FakeServer(inference_pb2_grpc.InferenceServicer, inference_pb2_grpc.AdminServicer):
    """Answers as a router would."""

    def __init__(self) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []

    def Generate(self, request, context):
        self.requests.append(request)
        if request.text == "bad":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "temperature: must be at least 0, got -1.0")
        if request.text == "gone":
            context.abort(grpc.StatusCode.UNAVAILABLE, "no gang is ready")
        yield inference_pb2.GenerateResponse(text="Hé", token_ids=[5, 6], request_id="r", seed=9)
        if request.text == "fails":
            yield inference_pb2.GenerateResponse(
                finish_reason=inference_pb2.FINISH_REASON_ERROR, detail="rank 2 died", usage=inference_pb2.Usage()
            )
            return
        yield inference_pb2.GenerateResponse(
            text="🙂\n",
            token_ids=[7],
            finish_reason=inference_pb2.FINISH_REASON_STOP,
            usage=inference_pb2.Usage(prompt_tokens=4, completion_tokens=3),
        )

    def GetStatus(self, request, context):
        rank = inference_pb2.RankStatus(rank=0, incarnation=1, pid=77, host="h", state="ready", experts=128)
        gang = inference_pb2.GangStatus(id="g", epoch=1, running=2, waiting=3, ranks=[rank], state="ready")
        return inference_pb2.Status(model="nano", gangs=[gang])


@pytest.fixture(scope="module")
def fake() -> Iterator[tuple[FakeServer, str]]:
    servicer = FakeServer()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    inference_pb2_grpc.add_AdminServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(0)


def test_generate_streams_text(fake, capsys) -> None:
    servicer, address = fake
    assert main(["generate", "Once", "--address", address, "--max-tokens", "3", "--seed", "9", "--ignore-eos"]) == 0
    assert capsys.readouterr().out == "Hé🙂\n\n"
    request = servicer.requests[-1]
    assert (request.text, request.max_tokens, request.seed, request.ignore_eos) == ("Once", 3, 9, True)
    assert not request.HasField("temperature"), "what is not given is the server's to choose"


def test_generate_json_is_the_last_line(fake, capsys) -> None:
    servicer, address = fake
    assert main(["generate", "1 2 3", "--token-ids", "--json", "--temperature", "0", "--address", address]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(line) == {
        "text": "Hé🙂\n",
        "token_ids": [5, 6, 7],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 4, "completion_tokens": 3},
    }
    assert ", " not in line
    request = servicer.requests[-1]
    assert list(request.token_ids.ids) == [1, 2, 3]
    assert request.temperature == 0


@pytest.mark.parametrize(
    ("prompt", "code", "says"), [("bad", 2, "temperature"), ("gone", 1, "no gang"), ("fails", 1, "rank 2")]
)
def test_generate_failures(fake, capsys, prompt: str, code: int, says: str) -> None:
    assert main(["generate", prompt, "--json", "--address", fake[1]]) == code
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_status(fake, capsys) -> None:
    assert main(["status", "--json", "--address", fake[1]]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "model": "nano",
        "gangs": [
            {
                "id": "g",
                "epoch": 1,
                "running": 2,
                "waiting": 3,
                "ranks": [
                    {
                        "rank": 0,
                        "incarnation": 1,
                        "pid": 77,
                        "host": "h",
                        "state": "ready",
                        "experts": 128,
                        "address": "",
                        "bytes_within_host": 0,
                        "bytes_between_hosts": 0,
                    }
                ],
                "hosts": [],
            }
        ],
    }
    assert main(["status", "--address", fake[1]]) == 0
    assert "nano" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "no command given"),
        (["fly"], 2, "invalid choice: 'fly'"),
        (["generate"], 2, "PROMPT"),
        (["generate", "x", "--max-tokens", "0"], 2, "must be from 1 to"),
        (["generate", "x", "--max-tokens", "ten"], 2, "must be a whole number"),
        (["generate", "x", "--seed", "-1"], 2, "--seed"),
        (["generate", "x", "--address", "9000"], 2, "must be HOST:PORT"),
        (["generate", "1 two", "--token-ids"], 2, "'two'"),
        (["generate", "-- -1", "--token-ids"], 2, "'--'"),
        (["generate", "x", "--address", "127.0.0.1:1"], 1, "no server answers at 127.0.0.1:1"),
        (["status", "--address", "127.0.0.1:1"], 1, "no server answers"),
        (["down", "--address", "127.0.0.1:1"], 2, "no server that this user started"),
        (["serve", "--ranks", "0"], 2, "must be at least 1"),
        (["serve", "--dtype", "int8"], 2, "invalid choice"),
        (["serve", "--grpc-port", "70000"], 2, "must be from 1 to 65535"),
        (["serve", "--model", "/nowhere"], 2, "/nowhere"),
        (["serve", "--config", "/nowhere.toml"], 2, "/nowhere.toml"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], code: int, says: str, capsys) -> None:
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.startswith("caravan: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_flags_are_frozen() -> None:
    """A public contract: whoever changes this list changes every user's scripts."""
    (commands,) = (action for action in make_parser()._actions if action.dest == "command")
    flags = {
        name: sorted(flag for action in parser._actions for flag in action.option_strings if flag.startswith("--"))
        for name, parser in commands.choices.items()
    }
    frozen = {
        "serve": "--config --dry-run --dtype --grpc-port --help --host --http-port --metrics-port --model --model-name "
        "--ranks --ray-address --routers",
        "generate": "--address --help --ignore-eos --json --max-tokens --seed --temperature --token-ids",
        "status": "--address --help --json",
        "down": "--address --help",
        "demo": "--help",
        "cache": "--dir --help --json",
        "bench": "--address --against --help --json --mix --output-tokens --png --prompt-tokens --rate --rounds "
        "--seconds --seed --streams",
    }
    assert {name: " ".join(flags[name]) for name in frozen} == frozen


def test_light_commands_import_neither_ray_nor_torch() -> None:
    code = (
        "import sys, cluster.cli, cluster.generate, cluster.status, cluster.down\n"
        "assert not {'ray', 'torch', 'transformers', 'numpy', 'tokenizers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version_is_quick(capsys) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("caravan ")
    assert time.monotonic() - started < 2, "a loaded machine is slow, an import of torch slower"
