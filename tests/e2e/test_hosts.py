"""A gang over four hosts: what a client in a fifth namespace gets, and what operators see."""

import sys
import time
from collections.abc import Iterator

import pytest

from tests.e2e.hosts_serving import PORTS, Cluster, HostsServer, cluster
from tests.e2e.serving import Server
from tests.hosts import requires_hosts

pytestmark = [requires_hosts(), pytest.mark.hosts, pytest.mark.timeout(300)]

PROMPTS = (
    "Call me Ishmael. Some years ago",
    "In the beginning God created",
    "It is a truth universally acknowledged, that",
    "Fellow-Citizens of the Senate and of the House",
)


@pytest.fixture(scope="module")
def four_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("hosts"), outside=True) as made:
        yield made


@pytest.fixture(scope="module")
def over_hosts(four_hosts: Cluster) -> Iterator[HostsServer]:
    server = HostsServer(four_hosts)
    server.wait_ready()
    yield server
    server.end()
    time.sleep(1)
    assert four_hosts.caravans == [], "nothing is left on any host"


def test_tokens_are_those_of_one_host(over_hosts: HostsServer, server: Server) -> None:
    for prompt in PROMPTS:
        arguments = ("--max-tokens", "24", "--temperature", "0", "--ignore-eos")
        one, several = server.generate(prompt, *arguments), over_hosts.generate(prompt, *arguments)
        assert several["token_ids"] == one["token_ids"], prompt


def test_status_shows_hosts(over_hosts: HostsServer, four_hosts: Cluster) -> None:
    over_hosts.generate(PROMPTS[0], "--max-tokens", "4")
    deadline = time.monotonic() + 15
    while True:
        (gang,) = over_hosts.status()["gangs"]
        hosts = {host["host"]: host for host in gang["hosts"]}
        if all(len(host["round_trip_seconds"]) == 3 for host in hosts.values()) and all(
            rank["bytes_between_hosts"] for rank in gang["ranks"]
        ):
            break
        assert time.monotonic() < deadline, gang
        time.sleep(0.5)
    assert [(host["hostname"], host["interface"], len(host["ranks"])) for host in gang["hosts"]] == [
        (host.hostname, "eth0", 2) for host in four_hosts.network.hosts
    ]
    assert all(host["ranks"][1] == host["ranks"][0] + 1 for host in hosts.values()), "neighbours share a host"
    assert all(0 < seconds < 1 for host in hosts.values() for seconds in host["round_trip_seconds"].values())
    for rank in gang["ranks"]:
        host, _, port = rank["address"].rpartition(":")
        assert rank["rank"] in hosts[host]["ranks"]
        assert PORTS["rank_ports"][0] <= int(port) <= PORTS["rank_ports"][1]
        assert rank["bytes_within_host"] > 0
    table = over_hosts.caravan("status").stdout
    assert "round trip" in table
    assert "10.77.0.4" in table


def test_every_host_has_one_metrics_endpoint(over_hosts: HostsServer, four_hosts: Cluster) -> None:
    for host in four_hosts.network.hosts:
        read = f"import urllib.request as u; print(u.urlopen('http://{host.address}:9400/metrics').read().decode())"
        done = four_hosts.network.client.run([sys.executable, "-c", read], timeout=20)
        assert done.returncode == 0, f"{host}: {done.stderr}"
        assert done.stdout.count("caravan_rank_info{") == 2
        assert f'host="{host.address}"' in done.stdout
        assert 'caravan_exchange_bytes_total{direction="sent"' in done.stdout


def test_the_plan_is_what_dry_run_says(over_hosts: HostsServer, four_hosts: Cluster) -> None:
    command = ["caravan", "serve", "--ray-address", four_hosts.address, "--ranks", "8", "--dry-run"]
    done = four_hosts.first.run(command, timeout=60)
    # Its room is taken by the gang that runs, which the sentence says host by host.
    assert done.returncode == 2
    assert "no room for 8 ranks of 1 CPU" in done.stderr
    assert "10.77.0.4" in done.stderr


def test_listeners_are_on_the_cluster_s_address_alone(over_hosts: HostsServer, four_hosts: Cluster) -> None:
    ours = {20300, 9000, 8000, 9400} | {port for first, last in PORTS.values() for port in range(first, last + 1)}
    for host in four_hosts.network.hosts:
        done = host.run(["ss", "-Hltn"], timeout=20)
        for line in done.stdout.splitlines():
            address, _, port = line.split()[3].rpartition(":")
            if int(port) in ours:
                assert address.strip("[]").removeprefix("::ffff:") == host.address, line


def test_nothing_is_asked_outside(over_hosts: HostsServer, four_hosts: Cluster) -> None:
    """Every host has a way out, at whose end somebody listens: nobody ever takes it."""
    assert over_hosts.generate(PROMPTS[0], "--max-tokens", "2")
    assert four_hosts.network.outside_attempts() == []
    reach_out = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('198.51.100.7', 53))"
    four_hosts.first.run([sys.executable, "-c", reach_out], timeout=20)
    assert four_hosts.network.outside_attempts() != [], "whoever does is heard"
