"""The Ray that a server runs on: its own, started small and gone with it, or a running one that it only joins."""

import contextlib
import importlib
import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import ServerError, UsageError, one_sentence
from cluster.lean_ray import SYSTEM_CONFIG, lean_head
from cluster.processes import adopt_orphans, end_descendants

NAMESPACE = "caravan"
# Nothing of Caravan's passes through the object store; this is about the least that Ray takes.
# Independent of the machine's networks, which may change under a running server. Ray takes 127.0.0.1 for a mistake and
# puts an address of the network in its place.
OWN_ADDRESS = "127.0.0.2"
OBJECT_STORE_BYTES = 100 * 2**20
# Replicas have one event loop, for Serve's calls and ours: gRPC does badly with two in a process.
SERVE_ENVIRONMENT = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}


@dataclass
class RayRuntime:
    """Start it once, in a thread that outlives it (Ray's processes end with the thread that started them); stop it from
    any thread, at any time, however far the start got.

    Args:
        address: of a running Ray; empty: start one.
        num_cpus: logical CPUs of a Ray of our own. They are only bookkeeping: Ray admits that many actors, and starts
            that many processes for them at once.
    """

    address: str
    num_cpus: int
    folder: Path = field(init=False)
    """Scratch folder, removed by `stop`. Short: Unix sockets lie in it, and their paths are bounded to 107 bytes."""

    def __post_init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="caravan-", dir="/tmp"))

    @property
    def is_own(self) -> bool:
        return not self.address

    def start(self, env: Mapping[str, str]) -> None:
        """Start or join.

        Args:
            env: environment of all processes of a Ray of our own, beside the inherited one.

        Raises:
            UsageError: nothing answers at `address`.
            ServerError: Ray did not start.
        """
        _quiet_environment()
        if self.is_own:
            adopt_orphans()
            # Whoever reaches this Ray's ports may run code as this user, so they must know the token.
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), **env)
        os.environ["PYTHONPATH"] = _python_path()
        ray = importlib.import_module("ray")
        try:
            if self.is_own:
                with lean_head():
                    ray.init(
                        address="local",
                        namespace=NAMESPACE,
                        num_cpus=self.num_cpus,
                        object_store_memory=OBJECT_STORE_BYTES,
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        _temp_dir=str(self.folder),
                        _node_ip_address=OWN_ADDRESS,
                        _system_config={**SYSTEM_CONFIG, "worker_maximum_startup_concurrency": self.num_cpus},
                    )
            else:
                ray.init(address=self.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            if self.is_own:
                raise ServerError(f"Ray did not start: {one_sentence(error, 300)}") from error
            raise UsageError(
                f"ray-address: no Ray can be joined at {self.address} ({one_sentence(error, 200)}); start one with "
                "`ray start --head`, or leave the flag out"
            ) from None

    def keep_logs(self) -> Path | None:
        """Move what the processes of a Ray of our own logged out of `stop`'s way; None where there is nothing."""
        logs = self.folder / "session_latest" / "logs"
        if not logs.is_dir():
            return None
        kept = Path(f"{self.folder}-logs")
        shutil.copytree(logs, kept, ignore_dangling_symlinks=True, dirs_exist_ok=True)
        for file in self.folder.glob("*.log"):
            shutil.copy(file, kept)
        return kept

    def stop(self) -> None:
        """End a Ray of our own with every process of it, within about 5 s. This process must end next."""
        # Ray's own shutdown is left out. It tells its processes in turn and waits, where nothing has anything to save;
        # and a thread that still uses Ray after it takes this process down at once. A Ray that lives on notices itself.
        if self.is_own:
            left = end_descendants(grace_s=1.0, bound_s=5.0)
            if left:
                print(f"caravan: processes {left} could not be ended", file=sys.stderr)
        shutil.rmtree(self.folder, ignore_errors=True)


def within(seconds: float, action: Callable[[], object]) -> bool:
    """Run `action` in a thread and wait for it no longer than `seconds`; True when it came back without an error."""
    done = threading.Event()

    def run() -> None:
        with contextlib.suppress(Exception, SystemExit):
            action()
            done.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return done.is_set()


def _quiet_environment() -> None:
    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0",
        RAY_DISABLE_IMPORT_WARNING="1",
        RAY_DEDUP_LOGS="0",
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
        RAY_DISABLE_DOCKER_CPU_WARNING="1",
        # A call too many must not start another Ray.
        RAY_ENABLE_AUTO_CONNECT="0",
        # Signals are this process's own business.
        RAY_DISABLE_FAILURE_SIGNAL_HANDLER="1",
        # Ranks and routers are what this machine is for; Ray would run them 15 steps below any other process.
        RAY_worker_niceness="0",
    )


def _python_path() -> str:
    """Ray's processes must find the packages that this process found, installed or not."""
    root = str(Path(__file__).resolve().parents[1])
    given = os.environ.get("PYTHONPATH", "")
    paths = [path for path in given.split(os.pathsep) if path]
    if root not in paths and "site-packages" not in Path(root).parts:
        paths.insert(0, root)
    return os.pathsep.join(paths)
