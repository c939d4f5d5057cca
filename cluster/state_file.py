"""Which servers of this user run on this machine: one small file each, so that `caravan down` finds them."""

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

WILDCARDS = ("0.0.0.0", "[::]", "::")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class ServerState:
    """A running `caravan serve`."""

    address: str
    """HOST:PORT of its gRPC front door."""
    metrics_address: str
    pid: int
    create_time: float
    """Seconds since 1970; with `pid` it names one process for certain."""

    @property
    def is_alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            started = abs(process.create_time() - self.create_time) < 0.05
            return started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def answers_at(self, address: str) -> bool:
        """Would a client that calls `address` reach this server?"""
        host, _, port = self.address.rpartition(":")
        wanted_host, _, wanted_port = address.rpartition(":")
        is_same_host = host == wanted_host or host in WILDCARDS or (host in LOOPBACK and wanted_host in LOOPBACK)
        return port == wanted_port and is_same_host


def folders() -> list[Path]:
    """Where such files may lie, the one to write to first."""
    fallback = Path(f"/tmp/caravan-{os.getuid()}")
    given = os.environ.get("XDG_RUNTIME_DIR")
    return [Path(given) / "caravan", fallback] if given and Path(given).is_dir() else [fallback]


def write_state(state: ServerState) -> Path:
    """Returns the file, for who wrote it to remove."""
    folder = folders()[0]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = folder / f"{state.address.replace(':', '_').replace('[', '').replace(']', '')}.json"
    partial = file.with_suffix(f".{state.pid}")
    partial.write_text(json.dumps(asdict(state)), encoding="utf-8")
    partial.replace(file)
    return file


def running_servers() -> list[ServerState]:
    """Servers of this user that live; files of dead ones are removed on the way."""
    found = []
    for folder in folders():
        # In a folder that is another user's nothing can be believed.
        if not folder.is_dir() or folder.stat().st_uid != os.getuid():
            continue
        for file in sorted(folder.glob("*.json")):
            try:
                state = ServerState(**json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                continue
            if state.is_alive:
                found.append(state)
            else:
                with contextlib.suppress(OSError):
                    file.unlink()
    return found


def this_server(address: str, metrics_address: str) -> ServerState:
    """The state of the process that asks."""
    process = psutil.Process()
    return ServerState(address, metrics_address, process.pid, process.create_time())
