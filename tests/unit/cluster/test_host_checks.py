"""Hosts before ranks start on them: each fault is found within its bound, and the sentence names host and cause."""

import asyncio
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.default_model import default_model_dir
from cluster.gang_hosts import GangHosts
from cluster.host import HostGoneError, HostSpec, HostWork, WantedModel, versions
from cluster.host_checks import check_facts, check_model, check_network, measure_round_trips
from cluster.launcher import Placed
from cluster.leader_config import LeaderConfig
from cluster.network import NetworkConfig
from cluster.ports import free_ports
from cluster.stages import Stage, place
from tests.unit.cluster.fake_hosts import GoneHost, LocalHost
from workers.errors import UserError
from workers.ports import PortRange

RANKS = {f"127.0.0.{number}": 2 for number in range(1, 5)}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[LocalHost]]:
    made = [LocalHost(tmp_path, number) for number in range(1, 5)]
    yield made
    for host in made:
        host.work.close()


async def facts(hosts: list[LocalHost]) -> None:
    await check_facts(hosts, versions(), bound_s=5)


async def test_good_hosts_pass(hosts: list[LocalHost]) -> None:
    await facts(hosts)
    assert [host.name for host in hosts] == [f"127.0.0.{number} (h{number})" for number in range(1, 5)]
    assert all(host.facts.interface == "lo" for host in hosts)
    await check_network(hosts, RANKS, f"127.0.0.1:{listening()}", bound_s=5)
    await check_model(hosts, 5, lambda: None)
    assert {host.model_dir for host in hosts} == {default_model_dir()}
    await measure_round_trips(hosts)
    assert set(hosts[0].round_trips) == {host.address for host in hosts[1:]}
    assert all(0 < seconds < 1 for seconds in hosts[0].round_trips.values())


_LISTENERS: list[socket.socket] = []


def listening() -> int:
    _LISTENERS.append(socket.create_server(("127.0.0.1", 0)))
    return int(_LISTENERS[-1].getsockname()[1])


async def test_a_version_that_differs(hosts: list[LocalHost]) -> None:
    hosts[2].pretended["versions"] = {**versions(), "torch": "2.0.1"}
    with pytest.raises(UserError, match=r"host 127.0.0.3 \(h3\) has torch 2.0.1, the gang's leader 2.13"):
        await facts(hosts)


async def test_an_address_twice(hosts: list[LocalHost]) -> None:
    hosts[3].pretended["address"] = "127.0.0.2"
    with pytest.raises(UserError, match=r"hosts h2 and h4 have the same address 127.0.0.2"):
        await facts(hosts)


async def test_a_full_disk(hosts: list[LocalHost]) -> None:
    hosts[1].pretended["free_bytes"] = 3_000_000
    with pytest.raises(UserError, match=r"host 127.0.0.2 \(h2\): .* has 3 MB free, .*make room"):
        await facts(hosts)


async def test_an_agent_that_does_not_start(hosts: list[LocalHost]) -> None:
    hosts[1].is_frozen = True
    with pytest.raises(HostGoneError, match=r"host 127.0.0.2: its agent has not started within 0.3 s"):
        await check_facts(hosts, versions(), bound_s=0.3)


async def test_a_host_that_is_gone_explains_the_rest(hosts: list[LocalHost], tmp_path: Path) -> None:
    hosts[0].answers["facts"] = UserError("host 127.0.0.1: something else")
    with pytest.raises(HostGoneError, match=r"host 127.0.0.9 is gone"):
        await facts([*hosts, GoneHost(tmp_path, 9)])


@pytest.mark.parametrize(
    ("ray_address", "network", "says"),
    [
        ("127.0.0.1", NetworkConfig(interface="eth9"), "has no 'eth9'; its interfaces are .*lo"),
        ("203.0.113.7", NetworkConfig(), "203.0.113.7 is no address of .*--node-ip-address"),
    ],
)
def test_a_wrong_address(tmp_path: Path, ray_address: str, network: NetworkConfig, says: str) -> None:
    with pytest.raises(UserError, match=says):
        HostWork(HostSpec(ray_address, network, tmp_path / "metrics", 0)).facts()


async def test_a_port_that_others_do_not_reach(hosts: list[LocalHost]) -> None:
    await facts(hosts)
    blocked = "127.0.0.3:20001"
    for host in hosts:
        if host is not hosts[2]:
            host.answers["unreachable"] = {blocked: "no answer within 3 s"}
    with pytest.raises(UserError) as caught:
        await check_network(hosts, RANKS, f"127.0.0.1:{listening()}", bound_s=5)
    assert str(caught.value) == (
        "host 127.0.0.3 (h3), port 20001 is not reached from hosts 127.0.0.1 (h1), 127.0.0.2 (h2), 127.0.0.4 (h4) "
        "(no answer within 3 s); open it in the firewall, see deploy/network.md"
    )


async def test_a_host_that_reaches_nobody(hosts: list[LocalHost]) -> None:
    await facts(hosts)
    others = {f"127.0.0.{number}:7": "no route to host" for number in (1, 2, 4)}
    hosts[2].answers["unreachable"] = others
    with pytest.raises(UserError, match=r"host 127.0.0.3 \(h3\) reaches none of the others \(no route to host\)"):
        await check_network(hosts, RANKS, f"127.0.0.1:{listening()}", bound_s=5)


async def test_a_leader_nobody_reaches(hosts: list[LocalHost]) -> None:
    await facts(hosts)
    (port,) = free_ports(1)
    with pytest.raises(UserError, match=rf"the leader at host 127.0.0.1 \(h1\), port {port} is not reached from"):
        await check_network(hosts, RANKS, f"127.0.0.1:{port}", bound_s=5)


async def test_ports_of_ranks_are_tried_and_given_back(tmp_path: Path) -> None:
    first = next(port for port in free_ports(50) if is_free(port) and is_free(port + 1))
    network = NetworkConfig(rank_ports=PortRange(first, first + 1))
    hosts = [LocalHost(tmp_path, number, network) for number in (1, 2)]
    await facts(hosts)
    assert (await hosts[0].call("open_ports", 2))[1:] == [first, first + 1]
    with pytest.raises(UserError, match=f"no free port in {first}-{first + 1} of 127.0.0.1; widen rank_ports"):
        await hosts[0].call("open_ports", 1)
    await hosts[0].call("close_ports")
    await check_network(hosts, {"127.0.0.1": 2, "127.0.0.2": 2}, f"127.0.0.1:{listening()}", bound_s=5)
    with socket.create_server(("127.0.0.1", first)):
        pass
    for host in hosts:
        host.work.close()


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


async def test_no_checkpoint_on_one_host(hosts: list[LocalHost], tmp_path: Path) -> None:
    await facts(hosts)
    lacking = LocalHost(tmp_path, 5, model=WantedModel(str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"host 127.0.0.5: .*nowhere.*copy the checkpoint there, or name"):
        await check_model([*hosts, lacking], 5, lambda: None)


async def test_another_checkpoint_on_one_host(hosts: list[LocalHost], tmp_path: Path) -> None:
    await facts(hosts)
    other = Path(shutil.copytree(default_model_dir(), tmp_path / "model"))
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    # Another training run's, say: a byte alone falls between the samples.
    data[1 << 20 :] = bytes(len(data) - (1 << 20))
    weights.write_bytes(data)
    hosts[1] = LocalHost(tmp_path, 2, model=WantedModel(str(other)))
    with pytest.raises(UserError, match=r"host 127.0.0.2 has another checkpoint at .* than host 127.0.0.1"):
        await check_model(hosts, 5, lambda: None)


async def test_a_fetch_that_stands_still(hosts: list[LocalHost]) -> None:
    await facts(hosts)
    state = hosts[0].work.model()
    hosts[1].answers["model"] = type(state)(bytes_done=5, bytes_total=10)
    with pytest.raises(
        HostGoneError, match=r"host 127.0.0.2 \(h2\) has not got the checkpoint: nothing came for 0.5 s"
    ):
        await check_model(hosts, 0.5, lambda: None)


async def test_the_way_of_a_gang_s_hosts(hosts: list[LocalHost]) -> None:
    entered: list[Stage] = []
    gone: list[str] = []
    config = LeaderConfig(host_silence_s=1.0)
    gang = GangHosts(config, entered.append, lambda: None, lambda host, why: gone.append(why))
    placed = Placed([f"127.0.0.{1 + rank // 2}" for rank in range(8)], hosts)
    addresses = await gang.prepare(placed, f"127.0.0.1:{listening()}")
    assert addresses == list(placed.host_of)
    assert entered == [Stage.HOSTS_CHECKED, Stage.NETWORK, Stage.CHECKPOINT]
    assert place(entered[0]) == "2/8"
    assert [(view.hostname, list(view.ranks)) for view in gang.views()] == [
        (f"h{number}", [2 * number - 2, 2 * number - 1]) for number in range(1, 5)
    ]
    await asyncio.sleep(1.5)
    assert gone == []
    started = time.monotonic()
    hosts[2].work.close()
    while not gone:
        assert time.monotonic() - started < 5
        await asyncio.sleep(0.05)
    assert "host 127.0.0.3 (h3) has been silent for" in gone[0]
    await gang.stop_watching()


async def test_ranks_of_one_host_need_none_of_it() -> None:
    gang = GangHosts(LeaderConfig(), lambda stage: None, lambda: None, lambda host, why: None)
    assert await gang.prepare(Placed(["127.0.0.1"] * 2), "127.0.0.1:1") == ["127.0.0.1"] * 2
    assert [list(view.ranks) for view in gang.views()] == [[0, 1]]
    assert gang.model_dir("127.0.0.1") is None
