"""Several processes that want one model, and what a kill leaves behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub import SERVED, Hub, environment, made_up_model, serving

SCRIPT = """
import sys
from pathlib import Path
from workers.model_fetch import fetch
from workers.model_source import ModelSource

def report(progress):
    print(progress.bytes_done, progress.bytes_total, progress.note, file=sys.stderr, flush=True)

print(fetch(ModelSource.parse(sys.argv[1]), Path(sys.argv[2]), report), flush=True)
"""
BIG = 4_000_000


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as hub:
        yield hub


@pytest.fixture
def start(hub: Hub, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start a process that fetches."""
    started: list[subprocess.Popen[str]] = []

    def begin() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, "hf://org/model", str(tmp_path / "cache")]
        env = {**os.environ, **environment(hub), "HF_HOME": str(tmp_path / "hf")}
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def folder_of(process: subprocess.Popen[str]) -> Path:
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    return Path(out.strip())


def test_two_at_once_fetch_once(hub: Hub, start: Callable[[], subprocess.Popen[str]], tmp_path: Path) -> None:
    model = made_up_model(tmp_path / "model", BIG)
    hub.add("org/model", model)
    hub.gate.clear()
    processes = [start() for _ in range(3)]
    # Until each has asked what there is, and so found nothing.
    wait_for(lambda: sum(path.startswith("/api") for path in hub.requests) == 3)
    hub.gate.set()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert {name: hub.served[name] for name in SERVED} == {name: (model / name).stat().st_size for name in SERVED}


def test_who_waits_sees_how_far_it_is_and_takes_over(
    hub: Hub, start: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    model = made_up_model(tmp_path / "model", BIG)
    hub.add("org/model", model)
    hub.pause_s = 0.05
    first = start()
    wait_for(lambda: hub.served["model.safetensors"] > 500_000)
    second = start()
    assert second.stderr is not None
    seen = ""
    while "another process fetches it" not in seen:
        seen = second.stderr.readline()
        assert seen, second.poll()
    wait_for(lambda: hub.served["model.safetensors"] > 1_500_000)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=10)
    hub.pause_s = 0
    folder = folder_of(second)
    assert (folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    size = (model / "model.safetensors").stat().st_size
    # What the killed one was sent but had not yet written is lost: what sockets hold.
    assert size <= hub.served["model.safetensors"] < size + 1_500_000


def test_a_kill_loses_little(hub: Hub, start: Callable[[], subprocess.Popen[str]], tmp_path: Path) -> None:
    model = made_up_model(tmp_path / "model", BIG)
    hub.add("org/model", model)
    hub.pause_s = 0.02
    size = (model / "model.safetensors").stat().st_size
    for share in (0.3, 0.6):
        process = start()
        wait_for(
            lambda share=share: any(  # type: ignore[misc]
                path.stat().st_size > share * size for path in tmp_path.glob("cache/*/model.safetensors.partial")
            )
        )
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
        assert not list(tmp_path.glob("cache/*/caravan-manifest.json"))
    (partial,) = tmp_path.glob("cache/*/model.safetensors.partial")
    there = partial.stat().st_size
    hub.pause_s = 0
    hub.headers.clear()
    hub.requests.clear()
    folder = folder_of(start())
    ranges = {headers.get("range") for headers in hub.headers if "range" in headers}
    assert ranges == {f"bytes={there}-{size - 1}"}, "only what was missing, and whole files came once"
    assert (folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_ctrl_c_leaves_what_is_there(hub: Hub, start: Callable[[], subprocess.Popen[str]], tmp_path: Path) -> None:
    model = made_up_model(tmp_path / "model", BIG)
    hub.add("org/model", model)
    hub.pause_s = 0.05
    process = start()
    wait_for(lambda: hub.served["model.safetensors"] > 1_000_000)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0
    (partial,) = tmp_path.glob("cache/*/model.safetensors.partial")
    assert partial.stat().st_size > 500_000
