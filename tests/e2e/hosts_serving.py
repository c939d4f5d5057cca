"""A Ray of several hosts with a `caravan serve` on the first of them."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any

from tests.hosts import Host, HostNetwork, RayNode, Sizes, keep_logs, start_cluster, wait_joined
from workers.cache_folder import cache_folder

RANKS_A_HOST = 2
PORTS = {"rank_ports": (20000, 20019), "exchange_ports": (20100, 20119), "agent_ports": (20200, 20201)}
START_BOUND_S = 150
CONFIG = "/tmp/caravan.toml"
# With reports off, Ray's head still tells its makers that they are: to this address, where nobody listens.
OFFLINE = {"RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9"}


class Cluster:
    """Hosts with Ray on them, and a client host without."""

    def __init__(self, network: HostNetwork, nodes: list[RayNode]) -> None:
        self.network, self.nodes = network, nodes

    @property
    def first(self) -> Host:
        return self.network[0]

    @property
    def address(self) -> str:
        """Of Ray."""
        return self.nodes[0].address

    @property
    def caravans(self) -> list[str]:
        """What runs on any host and is Caravan's. Serve's controller and idle workers are Ray's."""
        return [
            f"{host.hostname}: {command}"
            for host in self.network.hosts
            for command in (" ".join(process.cmdline()) for process in host.processes())
            if any(name in command for name in ("RankActor", "HostAgent", "ServeReplica", "cluster.cli", "bin/caravan"))
        ]


@contextmanager
def cluster(folder: Path, size: int = 4, sizes: Sizes | None = None, outside: bool = False) -> Iterator[Cluster]:
    """Up from here to the end of the block; logs of Ray are kept in `folder` when it ends with an exception.

    Args:
        outside: hosts have a way out, at whose end somebody listens.
    """
    with HostNetwork(size, client=True, sizes=sizes, outside=outside) as network:
        for host in network.hosts:
            share_kernels(host)
        # Without it Ray's head asks the cloud's metadata service where it is, telemetry or not; see deploy/network.md.
        network[0].path("/tmp/home/ray_bootstrap_config.yaml").write_text("{}\n")
        nodes = start_cluster(network.hosts, num_cpus=RANKS_A_HOST, env=OFFLINE)
        wait_joined(nodes[0], size)
        try:
            yield Cluster(network, nodes)
        except BaseException:
            keep_logs(network.hosts, folder)
            raise


def share_kernels(host: Host) -> None:
    """Compiled kernels are the machine's: else every host would compile its own, which takes a minute here."""
    cache = host.path("/tmp/home/.cache/caravan")
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "kernels").symlink_to(cache_folder("kernels").resolve())


class HostsServer:
    """`caravan serve` on the first host, from construction to `end`."""

    def __init__(self, cluster: Cluster, *arguments: str, config: str = "", ranks: int = 8) -> None:
        self.cluster, self.host = cluster, cluster.first
        self.address = f"{self.host.address}:9000"
        ranges = "".join(f'{name} = "{first}-{last}"\n' for name, (first, last) in PORTS.items())
        self.host.path(CONFIG).write_text(config or f"[network]\nleader_port = 20300\n{ranges}")
        self._stderr = self.host.path("/tmp/serve.stderr")
        with self._stderr.open("w") as stderr:
            self.process = self.host.popen(
                [
                    *("caravan", "serve", "--ray-address", cluster.address, "--host", self.host.address),
                    *("--ranks", str(ranks), "--dtype", "float32", "--config", CONFIG, *arguments),
                ],
                stdout=PIPE,
                stderr=stderr,
                text=True,
                env={"CARAVAN_TEST": "1"},
            )
        self.started = time.monotonic()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def wait_ready(self) -> float:
        """Seconds from its start until it answers."""
        line = self.process.stdout.readline()
        assert line.startswith("ready "), self.stderr
        return time.monotonic() - self.started

    def wait_stage(self, text: str) -> None:
        deadline = time.monotonic() + START_BOUND_S
        while text not in self.stderr:
            assert time.monotonic() < deadline, f"{text!r} did not come: {self.stderr}"
            assert self.process.poll() is None, f"it ended: {self.stderr}"
            time.sleep(0.05)

    def refused(self, bound_s: float) -> str:
        """The one sentence with which it ends by itself within `bound_s`."""
        try:
            code = self.process.wait(bound_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still runs after {bound_s} s: {self.stderr}") from None
        assert code in (1, 2), self.stderr
        assert "Traceback" not in self.stderr
        (line,) = [line for line in self.stderr.splitlines() if line.startswith("caravan: ")][-1:]
        return line

    def end(self) -> None:
        self.process.terminate()
        assert self.process.wait(30) == 0, self.stderr

    def caravan(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """A command on the client host."""
        command = ["caravan", *arguments, "--address", self.address]
        done = self.cluster.network.client.run(command, timeout=timeout)
        assert done.returncode == 0, done.stderr
        return done

    def generate(self, prompt: str, *arguments: str) -> dict[str, Any]:
        return json.loads(self.caravan("generate", prompt, "--json", *arguments).stdout.splitlines()[-1])

    def status(self) -> dict[str, Any]:
        return json.loads(self.caravan("status", "--json").stdout)
