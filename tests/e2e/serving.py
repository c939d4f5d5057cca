"""A `caravan serve` in a process of its own, and proof that nothing of it is left."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from cluster.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
# Inherited by every process of a server, so that all of them can be found whoever their parent is by then.
MARK = "CARAVAN_TEST_MARK"
START_BOUND_S = 90


def caravan(
    *arguments: str, env: dict[str, str] | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def marked(mark: str) -> list[psutil.Process]:
    """Living processes that carry the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue
    return found


class Server:
    """Started by the constructor; `wait_ready` returns when it answers."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        grpc_port, http_port, metrics_port = map(str, free_ports(3))
        self.address, self.metrics = f"127.0.0.1:{grpc_port}", f"127.0.0.1:{metrics_port}"
        self.http = f"127.0.0.1:{http_port}"
        self.env = {MARK: uuid.uuid4().hex, "XDG_RUNTIME_DIR": str(folder)}
        ports = ("--grpc-port", grpc_port, "--http-port", http_port, "--metrics-port", metrics_port)
        self._stderr = (folder / "stderr").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "serve", *arguments, *ports],
            cwd=ROOT,
            env={**os.environ, **self.env},
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def left(self) -> list[psutil.Process]:
        """Processes of the server that live."""
        return marked(self.env[MARK])

    def wait_ready(self) -> str:
        """The ready line."""
        line = self.process.stdout.readline()
        assert line, f"the server ended with {self.process.wait(20)}: {self.stderr}"
        return line.rstrip("\n")

    def wait_stage(self, text: str) -> None:
        """Until stderr says so."""
        deadline = time.monotonic() + START_BOUND_S
        while text not in self.stderr:
            assert time.monotonic() < deadline, f"{text!r} did not come: {self.stderr}"
            assert self.process.poll() is None, f"the server ended: {self.stderr}"
            time.sleep(0.05)

    def end(self, number: signal.Signals = signal.SIGTERM) -> float:
        """Seconds from the signal until every process is gone."""
        started = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(20)
        while self.left and time.monotonic() - started < 20:
            time.sleep(0.05)
        return time.monotonic() - started

    def kill_all(self) -> None:
        """After a test that went wrong."""
        for process in self.left:
            process.kill()
        self.process.wait(10)
        self._stderr.close()

    def caravan(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return caravan(
            *arguments, "--address", self.address, env={"XDG_RUNTIME_DIR": str(self.folder)}, timeout=timeout
        )

    def generate(self, prompt: str, *arguments: str) -> dict[str, Any]:
        done = self.caravan("generate", prompt, "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def status(self) -> dict[str, Any]:
        done = self.caravan("status", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
