"""Ray on hosts, as an operator starts it: `ray start --head` on one, `ray start --address` on the others."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.hosts.cell import MIB, CellProcess, HostsError
from tests.hosts.host import Host

GCS_PORT = 6379
START_BOUND_S = 90.0
OBJECT_STORE_BYTES = 80 * MIB  # About the least that Ray takes.
LOG = "/tmp/ray-start.log"
SESSIONS = "/tmp/ray"
STARTED = "Ray runtime started."
# Fixed, so that a raylet need not wait until its agents, which are Python, say theirs. Hosts can have the same ones.
_PORTS = {
    "node-manager-port": 6380,
    "object-manager-port": 6381,
    "runtime-env-agent-port": 6382,
    "dashboard-agent-grpc-port": 6383,
    "dashboard-agent-listen-port": 6384,
    "metrics-export-port": 6385,
    "min-worker-port": 10002,
    "max-worker-port": 10999,
}
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
    "RAY_worker_niceness": "0",
    "RAY_enable_metrics_collection": "0",
}
_COUNT_NODES = """
import sys, time
from ray._raylet import GcsClient
address, wanted, bound = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
deadline = time.monotonic() + bound
client, alive = GcsClient(address=address), []
while True:
    try:
        nodes = client.get_all_node_info(timeout=5)
        alive = sorted(one.node_manager_address for one in nodes.values() if one.state == 0)
    except Exception as error:
        alive = [str(error)]
    if len(alive) == wanted or time.monotonic() > deadline:
        print(*alive)
        sys.exit(len(alive) != wanted)
    time.sleep(0.1)
"""


@dataclass
class RayNode:
    """A `ray start --block` under way on a host. It, and all that it starts, ends with the host."""

    host: Host
    process: CellProcess
    node_address: str
    """That by which it joins."""

    @property
    def address(self) -> str:
        """Of a head: what others join."""
        return f"{self.node_address}:{GCS_PORT}"

    @property
    def log(self) -> str:
        """What `ray start` said."""
        try:
            return self.host.path(LOG).read_text(errors="replace")
        except OSError:
            return ""

    @property
    def has_started(self) -> bool:
        return STARTED in self.log

    def wait(self, bound_s: float = START_BOUND_S) -> None:
        """Until it has joined.

        Raises:
            HostsError: it ended, or did not join in time; with the end of its log.
        """
        deadline = time.monotonic() + bound_s
        while not self.has_started:
            code = self.process.poll()
            if code is not None:
                raise HostsError(f"`ray start` on {self.host} ended with {code}: {self._tail()}")
            if time.monotonic() > deadline:
                raise HostsError(f"`ray start` on {self.host} did not join within {bound_s:.0f} s: {self._tail()}")
            time.sleep(0.05)

    def stop(self, bound_s: float = 20) -> None:
        """End Ray on the host, the host stays: as SIGTERM to `ray start --block`, then for certain."""
        self.process.terminate()
        try:
            self.process.wait(bound_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(bound_s)

    def _tail(self) -> str:
        texts = [_last_lines(self.host.path(LOG), 20) or "it said nothing"]
        for name in ("raylet.out", "raylet.err", "gcs_server.out", "gcs_server.err"):
            for path in self.host.path(SESSIONS).glob(f"session_2*/logs/{name}"):
                texts.append(f"--- {name}\n{_last_lines(path, 5)}")
        return "\n".join(texts)


def start_ray(
    host: Host,
    *,
    head: RayNode | None = None,
    num_cpus: int = 2,
    node_ip_address: str = "",
    labels: Mapping[str, str] | None = None,
    resources: Mapping[str, float] | None = None,
    env: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> RayNode:
    """Start Ray on a host and return at once; `RayNode.wait` is next. Nodes and their head may be started side by side.

    Args:
        head: the node to join; None: this is the head.
        num_cpus: logical ones.
        node_ip_address: instead of the host's own.
        labels: of the node.
        resources: of the node, beside CPUs.
        env: of Ray and all its workers there.
        options: more of `ray start`'s; a later one of the same name wins.
    """
    node_address = node_ip_address or host.address
    joining = ["--head", f"--port={GCS_PORT}", "--include-dashboard=false"] if head is None else []
    if head is not None:
        joining = [f"--address={head.address}"]
    if labels:
        joining.append("--labels=" + ",".join(f"{name}={value}" for name, value in labels.items()))
    if resources:
        joining.append(f"--resources={json.dumps(dict(resources))}")
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
        "--include-log-monitor=false",
        "--log-color=false",
        f"--node-ip-address={node_address}",
        f"--num-cpus={num_cpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        *(f"--{name}={port}" for name, port in _PORTS.items()),
        *joining,
        *options,
    ]
    with host.path(LOG).open("wb") as log:
        process = host.popen(
            command, env={**_ENVIRONMENT, **(env or {})}, stdout=log, stderr=subprocess.STDOUT, cwd="/tmp"
        )
    return RayNode(host, process, node_address)


def start_cluster(hosts: Iterable[Host], *, num_cpus: int = 2, env: Mapping[str, str] | None = None) -> list[RayNode]:
    """Ray on all of them, the first one its head; returns when all have joined."""
    nodes: list[RayNode] = []
    for host in hosts:
        nodes.append(start_ray(host, head=nodes[0] if nodes else None, num_cpus=num_cpus, env=env))
    for node in nodes:
        node.wait()
    return nodes


def wait_joined(head: RayNode, count: int, bound_s: float = START_BOUND_S) -> list[str]:
    """Until exactly so many nodes are alive in the head's eyes; their addresses.

    Raises:
        HostsError: they were not within the bound.
    """
    argv = [sys.executable, "-c", _COUNT_NODES, head.address, str(count), str(bound_s)]
    done = head.host.run(argv, env=_ENVIRONMENT, timeout=bound_s + 60)
    if done.returncode:
        seen = done.stdout.strip() or done.stderr.strip()[-500:]
        raise HostsError(f"{count} nodes were to be alive within {bound_s:.0f} s; {head.host} sees: {seen or 'none'}")
    return done.stdout.split()


def keep_logs(hosts: Iterable[Host], folder: Path) -> None:
    """Copy what Ray logged on each host out of it, before it is gone."""
    for host in hosts:
        target = folder / host.hostname
        target.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            shutil.copy(host.path(LOG), target)
        # Not through `session_latest`: out here, that link leads elsewhere.
        for logs in host.path(SESSIONS).glob("session_2*/logs"):
            with contextlib.suppress(shutil.Error, OSError):
                shutil.copytree(logs, target / "logs", ignore_dangling_symlinks=True, dirs_exist_ok=True)


def _last_lines(path: Path, count: int) -> str:
    with contextlib.suppress(OSError):
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        return "\n".join(lines[-count:])
    return ""
