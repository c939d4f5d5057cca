"""Hosts as namespaces: nothing of them is left, however their harness ends; and Ray on them."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.hosts import HostNetwork, HostsError, keep_logs, requires_hosts, start_ray, wait_joined

pytestmark = [requires_hosts(), pytest.mark.hosts]

ROOT = Path(__file__).resolve().parents[2]
BOUND_S = 10.0

MARK = "CARAVAN_TEST_MARK"
# Prints the namespaces' numbers when all is up, and then waits to be killed.
HARNESS = textwrap.dedent(
    """
    import json, os, sys, time
    from tests.hosts import HostNetwork
    print(json.dumps({}), flush=True)
    with HostNetwork(3, client=True) as network:
        for host in network.hosts:
            host.run(["setsid", "--fork", "sleep", "300"], stdout=None, stderr=None)
            host.popen(["bash", "-c", "trap '' TERM INT HUP; while :; do sleep 0.1; done"])
        network[1].freeze()
        network.delay(network[2], 1)
        inside = {f"/proc/{host.pid}/ns/{kind}" for host in network.hosts for kind in ("net", "mnt", "pid", "uts")}
        fabric = {f"/proc/{network._fabric.pid}/ns/{kind}" for kind in ("net", "mnt", "pid")}
        print(json.dumps(sorted(os.readlink(path) for path in inside | fabric)), flush=True)
        time.sleep(300)
    """
)


def eventually(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + BOUND_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {BOUND_S} s: {what}"
        time.sleep(0.01)


def start_harness(mark: str) -> subprocess.Popen[str]:
    # A session of its own, so that nothing but the harness's death tells its processes anything.
    return subprocess.Popen(
        [sys.executable, "-c", HARNESS],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), MARK: mark},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def namespaces() -> set[str]:
    """All that a process of the machine is in."""
    found = set()
    for process in psutil.pids():
        for kind in ("net", "mnt", "pid", "uts"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(f"/proc/{process}/ns/{kind}"))
    return found


def world() -> dict[str, object]:
    return {
        "interfaces": sorted(os.listdir("/sys/class/net")),
        "named": sorted(os.listdir("/var/run/netns")) if Path("/var/run/netns").exists() else [],
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "addresses": subprocess.check_output(["ip", "-br", "addr"], text=True),
        "groups": sorted(str(path) for path in Path("/sys/fs/cgroup").glob("*/*") if path.is_dir()),
    }


def test_nothing_is_left_of_a_harness_that_is_killed() -> None:
    before, mark = world(), uuid.uuid4().hex
    harness = start_harness(mark)
    try:
        harness.stdout.readline()
        made = set(json.loads(harness.stdout.readline()))
        assert len(made) == 15 and made <= namespaces()
        assert len(marked(mark)) >= 12
    finally:
        harness.kill()
        harness.communicate()
    eventually(lambda: not marked(mark) and not made & namespaces(), "processes and namespaces are gone")
    assert world() == before


def test_nothing_is_left_of_a_harness_that_is_killed_while_it_starts() -> None:
    before = world()
    for wait_s in (0.0, 0.03, 0.08, 0.15, 0.25, 0.4):
        mark = uuid.uuid4().hex
        harness = start_harness(mark)
        harness.stdout.readline()
        time.sleep(wait_s)
        harness.kill()
        harness.communicate()
        eventually(lambda mark=mark: not marked(mark), f"nothing is left of what was killed after {wait_s} s")
    assert world() == before


def test_nothing_is_left_after_an_error_and_the_error_is_told() -> None:
    before = world()
    living: list[psutil.Process] = []

    def fail() -> None:
        with HostNetwork(2) as network:
            network[0].popen(["sleep", "300"])
            network[1].popen(["sleep", "300"])
            network[1].freeze()
            living.extend(process for host in network.hosts for process in host.processes())
            living.extend(psutil.Process(host.pid) for host in network.hosts)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(living) == 4
    assert not any(process.is_running() for process in living)
    assert world() == before


def test_nothing_is_left_of_hosts_that_could_not_all_be_made(tmp_path: Path) -> None:
    before = {process.pid for process in psutil.Process().children()}
    with pytest.raises(HostsError, match="no-such-folder"):
        HostNetwork(3, shared=[tmp_path / "no-such-folder"]).__enter__()
    assert {process.pid for process in psutil.Process().children()} <= before


def test_a_command_among_hosts() -> None:
    def hosts(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.hosts", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    done = hosts("--hosts", "2", "--on", "host2", "--", "bash", "-c", "hostname; exit 5")
    assert (done.returncode, done.stdout) == (5, "host2\n")
    done = hosts("--hosts", "1", "--on", "host9", "--", "true")
    assert done.returncode == 1 and done.stderr.endswith("no host 'host9', there are host1\n")
    assert hosts("--hosts", "0").returncode == 2


# --- With Ray: seconds of start, and hundreds of MiB a node.

ACTORS = textwrap.dedent(
    """
    import json, socket, sys, ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
    ray.init(address=sys.argv[1], log_to_driver=False)
    @ray.remote(num_cpus=1)
    class Actor:
        def where(self):
            import cluster
            return f"{socket.gethostname()} {ray.util.get_node_ip_address()}"
    actors = [Actor.options(scheduling_strategy=On(node["NodeID"], False)).remote() for node in ray.nodes()]
    print(json.dumps(sorted(ray.get([actor.where.remote() for actor in actors], timeout=60))))
    node = next(node for node in ray.nodes() if node["NodeManagerAddress"] == "10.77.0.2")
    print(json.dumps([node["Labels"].get("zone"), node["Resources"].get("slot"), node["Resources"].get("CPU")]))
    """
)


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_ray_on_two_hosts_runs_an_actor_on_each(tmp_path: Path) -> None:
    with HostNetwork(2) as network:
        first, second = network
        head = start_ray(first, num_cpus=1)
        other = start_ray(second, head=head, num_cpus=3, labels={"zone": "b"}, resources={"slot": 2})
        head.wait()
        other.wait()
        assert wait_joined(head, 2) == [first.address, second.address]
        done = second.run([sys.executable, "-c", ACTORS, head.address], timeout=120)
        assert not done.returncode, done.stderr
        where, node = map(json.loads, done.stdout.splitlines())
        assert where == ["host1 10.77.0.1", "host2 10.77.0.2"]
        assert node == ["b", 2, 3]
        with pytest.raises(
            HostsError, match=r"3 nodes were to be alive within 1 s; host1 .* sees: 10.77.0.1 10.77.0.2"
        ):
            wait_joined(head, 3, bound_s=1)
        keep_logs(network.hosts, tmp_path)
        assert (tmp_path / "host1" / "logs" / "gcs_server.out").exists()
        assert (tmp_path / "host2" / "logs" / "raylet.out").exists()
        living = [process for host in network.hosts for process in host.processes()]
        assert len(living) > 6
        other.stop()
        bad = start_ray(second, head=head, options=["--no-such-option"])
        with pytest.raises(HostsError, match=r"(?s)host2 .* ended with 2: .*no-such-option"):
            bad.wait()
    assert not any(process.is_running() for process in living)
