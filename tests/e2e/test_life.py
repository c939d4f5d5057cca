"""How servers start, fail and end: exit codes, one line, and no process left."""

import json
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from protos.client import Client, make_request
from protos.errors import CaravanError
from tests.e2e.serving import MARK, Server, caravan, marked

Starter = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    servers: list[Server] = []

    def start(*arguments: str) -> Server:
        servers.append(Server(tmp_path / f"server-{len(servers)}", *arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.kill_all()


def bad_model(folder: Path, checkpoint: Path, kind: str) -> Path:
    """A checkpoint with one thing wrong."""
    model = Path(shutil.copytree(checkpoint, folder / "model"))
    if kind == "no folder":
        return folder / "nowhere"
    if kind == "no checkpoint":
        (model / "config.json").unlink()
    elif kind == "no tokenizer":
        (model / "tokenizer.json").unlink()
    elif kind == "truncated":
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        edits = {"another type": {"model_type": "llama"}, "wrong shape": {"num_local_experts": 64}}
        config = json.loads((model / "config.json").read_text())
        # A layer more than the weights have: its tensors are missing.
        layers = config["num_hidden_layers"] + 1
        edits["missing tensor"] = {"num_hidden_layers": layers, "no_rope_layers": [1] * layers}
        (model / "config.json").write_text(json.dumps({**config, **edits[kind]}))
    return model


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("no folder", "nowhere"),
        ("no checkpoint", "config.json: no such file"),
        ("no tokenizer", "tokenizer.json"),
        ("another type", "model_type is 'llama'"),
        ("truncated", "model.safetensors: is truncated"),
        ("missing tensor", "is missing"),
        ("wrong shape", "has shape"),
    ],
)
def test_a_bad_checkpoint(tmp_path: Path, checkpoint: Path, kind: str, says: str) -> None:
    refused("--model", str(bad_model(tmp_path, checkpoint, kind)), says=says)


def test_more_ranks_than_experts(checkpoint: Path) -> None:
    refused("--model", str(checkpoint), "--ranks", "129", says="129 are more than the model's 128 experts")


def test_an_unknown_key_in_the_file(tmp_path: Path, checkpoint: Path) -> None:
    file = tmp_path / "caravan.toml"
    file.write_text("[engine]\nmax_num_sequences = 4\n")
    refused("--model", str(checkpoint), "--config", str(file), says="unknown key 'max_num_sequences'; did you mean")


@pytest.mark.parametrize("flag", ["--grpc-port", "--http-port", "--metrics-port"])
def test_a_port_in_use(checkpoint: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        refused("--model", str(checkpoint), flag, str(port), says=f"{flag[2:]}: port {port} of 127.0.0.1 is in use")


def refused(*arguments: str, says: str) -> None:
    mark = f"refused-{time.monotonic_ns()}"
    done = caravan("serve", *arguments, env={MARK: mark})
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert marked(mark) == []


@pytest.mark.timeout(180)
def test_what_only_a_rank_can_tell(start: Starter, tmp_path: Path, checkpoint: Path) -> None:
    """KV pools too small for one block: the rank's own sentence comes out, once, and the gang is not tried again."""
    file = tmp_path / "caravan.toml"
    file.write_text("[engine]\nkv_memory_bytes = 1000\n")
    server = start("--model", str(checkpoint), "--ranks", "2", "--config", str(file))
    assert server.process.wait(90) == 2
    assert server.process.stdout.read() == ""
    (line,) = [line for line in server.stderr.splitlines() if line.startswith("caravan: ")]
    assert "kv_memory_bytes: 1000" in line
    assert "Traceback" not in server.stderr
    assert server.left == []


@pytest.mark.timeout(180)
def test_a_signal_while_loading(start: Starter, checkpoint: Path) -> None:
    server = start("--model", str(checkpoint), "--ranks", "2")
    server.wait_stage("starting the router")
    time.sleep(1)
    assert len(server.left) > 3
    # Impatience changes nothing.
    server.process.send_signal(signal.SIGTERM)
    assert server.end(signal.SIGTERM) < 10
    assert server.left == []
    assert server.process.returncode == 143
    assert "Traceback" not in server.stderr


@pytest.mark.timeout(180)
def test_a_gang_that_fails_for_good_ends_the_server(start: Starter, tmp_path: Path) -> None:
    file = tmp_path / "once.toml"
    file.write_text("[gang]\nrestarts = 0\nfewest_ranks = 2\n")
    server = start("--ranks", "2", "--config", str(file))
    server.wait_ready()
    psutil.Process(server.status()["gangs"][0]["ranks"][1]["pid"]).kill()
    assert server.process.wait(40) == 1
    assert "the gang failed: rank 1" in server.stderr
    assert "Traceback" not in server.stderr
    assert server.left == []


@pytest.mark.timeout(240)
def test_a_lost_rank_and_down(start: Starter, checkpoint: Path) -> None:
    """A killed rank takes neither its streams nor the server with it; `caravan down` ends it under load."""
    server = start("--model", str(checkpoint), "--ranks", "2")
    server.wait_ready()
    with Client(server.address) as client:
        stream = client.generate(make_request("x", max_tokens=600, ignore_eos=True))
        first = next(stream)
        psutil.Process(server.status()["gangs"][0]["ranks"][1]["pid"]).kill()
        assert sum(len(response.token_ids) for response in (first, *stream)) == 600
        deadline = time.monotonic() + 60
        # Left out in epoch 2, taken in again in epoch 3.
        while len((gang := server.status()["gangs"][0])["ranks"]) < 2 or gang["epoch"] < 3:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert [(rank["incarnation"], rank["experts"]) for rank in gang["ranks"]] == [(1, 64), (3, 64)]
        until_it_answers(client)
        assert "caravan: epoch 2: without rank 1\ncaravan: epoch 3: every rank is there" in server.stderr

        assert server.caravan("generate", "x", "--max-tokens", "4").returncode == 0
        stream = client.generate(make_request("x", max_tokens=1900, ignore_eos=True))
        next(stream)
        started = time.monotonic()
        down = server.caravan("down")
        assert (down.returncode, down.stderr) == (0, "")
        assert time.monotonic() - started < 10
        assert server.left == []
        assert server.process.wait(1) == 0
        with pytest.raises(CaravanError):
            list(stream)
    again = server.caravan("down")
    assert again.returncode == 2
    assert "no server that this user started" in again.stderr


def until_it_answers(client: Client) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            client.complete(make_request("x", max_tokens=4))
            return
        except CaravanError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


@pytest.mark.timeout(180)
def test_demo(tmp_path: Path) -> None:
    """The first thing a newcomer runs, in an empty home."""
    mark = "demo"
    env = {
        MARK: mark,
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XDG_RUNTIME_DIR": str(tmp_path),
    }
    started = time.monotonic()
    done = caravan("demo", env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 60
    assert "tokens exchanged" in done.stdout
    assert done.stdout.count("│ 32           │") == 4, done.stdout
    assert "Traceback" not in done.stderr
    assert marked(mark) == []
