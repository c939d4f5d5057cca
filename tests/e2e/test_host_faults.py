"""Hosts that cannot work: each start fails within its bound, names the host and what it lacks, and leaves nothing.

Long: `make test-hosts` runs them, and ten starts in a row.
"""

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.default_model import default_model_dir
from tests.e2e.hosts_serving import PORTS, Cluster, HostsServer, cluster, share_kernels
from tests.hosts import Host, Sizes, requires_hosts, start_ray, wait_joined

pytestmark = [requires_hosts(), pytest.mark.hosts, pytest.mark.timeout(300)]

BOUND_S = 90
"""From the start of `caravan serve` on this machine; the stage itself has a shorter one."""
MODEL = "/tmp/model"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("hosts"), sizes=Sizes(tmp=400 << 20)) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(hosts: Cluster) -> Iterator[None]:
    yield
    deadline = time.monotonic() + 15
    while left := hosts.caravans:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def refused(hosts: Cluster, *arguments: str, says: str, config: str = "", ranks: int = 8) -> None:
    server = HostsServer(hosts, *arguments, config=config, ranks=ranks)
    sentence = server.refused(BOUND_S)
    assert re.search(says, sentence), sentence


def copy_model(host: Host) -> Path:
    target = host.path(MODEL)
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(default_model_dir(), target))


def test_an_interface_that_a_host_has_not(hosts: Cluster) -> None:
    for host in hosts.network.hosts[:3]:
        host.add_interface("eth1", f"10.78.0.{host.index}/24")
    config = '[network]\ninterface = "eth1"\n'
    refused(
        hosts, config=config, says=r"host 10.77.0.4 \(host4\): interface: host4 has no 'eth1'; .*eth0 \(10.77.0.4\)"
    )


def test_an_interface_that_leads_nowhere(hosts: Cluster) -> None:
    hosts.network[3].add_interface("eth1", "10.78.0.4/24")
    config = '[network]\ninterface = "eth1"\n'
    refused(hosts, config=config, says=r"10.78.0.\d \(host\d\).*is not reached from host.*deploy/network.md")


def test_a_closed_port(hosts: Cluster) -> None:
    host, (first, last) = hosts.network[2], PORTS["exchange_ports"]
    host.block_ports([(first, last)])
    try:
        refused(
            hosts,
            says=rf"host 10.77.0.3 \(host3\), port {first}, {first + 1} is not reached from hosts 10.77.0.1 \(host1\), "
            r"10.77.0.2 \(host2\), 10.77.0.4 \(host4\) \(no answer within 3 s\)",
        )
    finally:
        host.unblock_ports()


def test_no_checkpoint_on_a_host(hosts: Cluster) -> None:
    for host in hosts.network.hosts:
        copy_model(host)
    shutil.rmtree(hosts.network[2].path(MODEL))
    refused(hosts, "--model", MODEL, says=r"host 10.77.0.3 \(host3\): .*/tmp/model.*copy the checkpoint there")


def test_another_checkpoint_on_a_host(hosts: Cluster) -> None:
    for host in hosts.network.hosts:
        copy_model(host)
    weights = hosts.network[1].path(f"{MODEL}/model.safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[: 1 << 20] + bytes(len(data) - (1 << 20)))
    refused(hosts, "--model", MODEL, says=r"host 10.77.0.2 \(host2\) has another checkpoint at /tmp/model than host")
    for host in hosts.network.hosts:
        shutil.rmtree(host.path(MODEL))


def test_a_full_disk(hosts: Cluster) -> None:
    host = hosts.network[3]
    filler = host.path("/tmp/filler")
    free = shutil.disk_usage(host.path("/tmp")).free
    with filler.open("wb") as file:
        file.truncate(0)
        for _ in range((free - (20 << 20)) >> 20):
            file.write(bytes(1 << 20))
    try:
        refused(hosts, says=r"host 10.77.0.4 \(host4\): /tmp/.* has \d+ MB free, and logs and metrics need 67 MB")
    finally:
        filler.unlink()


def test_another_version_on_a_host(hosts: Cluster, tmp_path: Path) -> None:
    host = hosts.network.add(hostname="odd")
    share_kernels(host)
    other = host.path("/tmp/other/caravan-9.9.9.dist-info")
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: caravan\nVersion: 9.9.9\n")
    node = start_ray(host, head=hosts.nodes[0], env={"PYTHONPATH": "/tmp/other"})
    node.wait()
    try:
        refused(hosts, ranks=10, says=rf"host {host.address} \(odd\) has caravan 9.9.9, the gang's leader \d")
    finally:
        node.stop()
        wait_joined(hosts.nodes[0], 4)
        hosts.network.remove(host)


def test_an_address_twice(hosts: Cluster) -> None:
    host = hosts.network.add(hostname="twin")
    node = start_ray(host, head=hosts.nodes[0], node_ip_address=hosts.network[1].address)
    node.wait()
    try:
        refused(hosts, says=r"10.77.0.2 is the address of 2 hosts of this Ray \(host2 and twin\); give each its own")
    finally:
        node.stop()
        wait_joined(hosts.nodes[0], 4)
        hosts.network.remove(host)


@pytest.mark.timeout(900)
def test_ten_starts_in_a_row(hosts: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = []
    for _ in range(10):
        server = HostsServer(hosts)
        seconds.append(server.wait_ready())
        assert len(server.generate("Call me", "--max-tokens", "2", "--ignore-eos")["token_ids"]) == 2
        server.end()
    with capsys.disabled():
        print(f"\n10 of 10 starts ready, after {min(seconds):.0f} to {max(seconds):.0f} s")


def test_a_host_that_goes_during_the_start(hosts: Cluster) -> None:
    server = HostsServer(hosts, config="[gang]\nhosts_timeout_s = 10\n")
    server.wait_stage("5/8 starting 8 ranks")
    hosts.network.remove(hosts.network[3])
    sentence = server.refused(BOUND_S)
    assert "no room for 8 ranks" in sentence
    assert "host 10.77.0.4 (host4) was lost" in sentence
