"""A real Ray of three hosts (raylets, each with an address of its own on this machine): what is free on them, and that
room is reserved where the plan says."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ports import free_ports
from tests.e2e.serving import ROOT, caravan

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(240)]

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_AUTO_CONNECT": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
# Ends with its standard input, and all of Ray with it.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

common = {"include_dashboard": False, "object_store_memory": 80 * 2**20}
head = {"node_ip_address": "127.0.0.2", "gcs_server_port": int(sys.argv[1]), "temp_dir": sys.argv[2], "num_cpus": 2}
cluster = Cluster(initialize_head=True, head_node_args=common | head)
gpus = {"num_gpus": 2, "resources": {"accelerator_type:H100": 1}}
cluster.add_node(**common, node_ip_address="127.0.0.3", num_cpus=3, labels={"zone": "b"}, **gpus)
cluster.add_node(**common, node_ip_address="127.0.0.4", num_cpus=3, labels={"zone": "b"})
print("up", flush=True)
sys.stdin.read()
cluster.shutdown()
"""
RESERVE = """
import sys
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from cluster.placement import PlacementRequest, bundles, plan
from cluster.ray_hosts import hosts_at, joined_hosts

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
hosts = {host.address: host for host in joined_hosts()}
assert sorted(hosts) == ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
assert [host.address for host in hosts.values() if host.is_head] == ["127.0.0.2"]
gpus = hosts["127.0.0.3"]
assert (gpus.cpus, gpus.gpus, gpus.accelerator, gpus.labels["zone"]) == (3, 2, "H100", "b")
assert sorted(hosts_at(sys.argv[1]), key=lambda host: host.address) == sorted(hosts.values(), key=lambda h: h.address)

found = plan(PlacementRequest(6, hosts=3), list(hosts.values()))
group = placement_group(**bundles(found), name="x", lifetime="detached")
assert group.wait(30)
nodes = placement_group_table(group)["bundles_to_node_id"]
assert [nodes[rank] for rank in range(6)] == [host.node_id for host in found.hosts]

@ray.remote(num_cpus=1)
def where():
    return ray.get_runtime_context().get_node_id()

tasks = [
    where.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank)).remote() for rank in range(6)
]
assert ray.get(tasks, timeout=60) == [host.node_id for host in found.hosts]
left = {host.address: host.cpus for host in joined_hosts()}
assert left == {"127.0.0.2": 0, "127.0.0.3": 1, "127.0.0.4": 1}, left
remove_placement_group(group)
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a Ray that ends with this module's tests."""
    (port,) = free_ports(1, "127.0.0.2")
    with tempfile.TemporaryDirectory(prefix="cv-", dir="/tmp") as folder:
        cluster = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, str(port), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(Path(folder) / "stderr").open("w"),
            env={**os.environ, **QUIET},
            text=True,
        )
        assert cluster.stdin is not None and cluster.stdout is not None
        try:
            told = cluster.stdout.readline()
            assert told == "up\n", (Path(folder) / "stderr").read_text()
            yield f"127.0.0.2:{port}"
        finally:
            cluster.stdin.close()
            cluster.wait(30)


def test_room_is_reserved_where_the_plan_says(address: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RESERVE, address],
        cwd=ROOT,
        env={**os.environ, **QUIET, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_plan_is_printed_without_joining(address: str) -> None:
    ports = [str(port) for port in free_ports(3)]
    flags = ["--grpc-port", ports[0], "--http-port", ports[1], "--metrics-port", ports[2], "--ray-address", address]
    deadline = time.monotonic() + 20
    # What the test before reserved comes free a moment later.
    while (done := caravan("serve", "--dry-run", "--ranks", "8", *flags)).returncode and time.monotonic() < deadline:
        time.sleep(0.5)
    assert done.returncode == 0, done.stderr
    assert "8 ranks on 3 hosts of the Ray at" in done.stdout
    assert all(host in done.stdout for host in ("127.0.0.2", "127.0.0.3", "127.0.0.4"))
    refused = caravan("serve", "--dry-run", "--ranks", "9", *flags)
    assert refused.returncode == 2
    assert "no room for 9 ranks of 1 CPU; hosts: 127.0.0.3" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_an_address_where_something_else_listens() -> None:
    ports = free_ports(3)
    flags = ["--grpc-port", str(ports[0]), "--http-port", str(ports[1]), "--metrics-port", str(ports[2])]
    done = caravan("serve", "--dry-run", "--ray-address", f"127.0.0.1:{ports[0]}", *flags)
    assert done.returncode == 2
    assert "ray-address: nothing can be reached at" in done.stderr
    assert done.stderr.count("\n") == 1
