"""Ports in ranges, addresses of interfaces, and what the user is told when one cannot be had."""

import socket
import sys
from concurrent import futures
from contextlib import ExitStack

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.network import (
    NetworkConfig,
    PortRange,
    address_of,
    bind_port,
    interface_of,
    interfaces,
    join_address,
    route_address,
    serve_on,
    split_address,
)
from cluster.ports import free_ports
from workers.errors import UserError

LOCAL = "127.0.0.1"


def range_of(count: int) -> PortRange:
    """So many neighbouring ports that were free a moment ago."""
    for _ in range(50):
        (first,) = free_ports(1)
        try:
            with ExitStack() as probes:
                for port in range(first, first + count):
                    probes.enter_context(socket.create_server((LOCAL, port)))
            return PortRange(first, first + count - 1)
        except (OSError, OverflowError):
            continue
    pytest.fail("no neighbouring ports are free")


# ---- ranges -----------------------------------------------------------------------------------------------------


@given(first=st.integers(1, 65535), count=st.integers(1, 500))
def test_a_range_is_read_as_it_is_written(first: int, count: int) -> None:
    last = min(65535, first + count - 1)
    ports = PortRange.parse(f" {first} - {last}")
    assert (ports.first, ports.last, len(ports)) == (first, last, last - first + 1)
    assert list(ports) == list(range(first, last + 1))
    assert first in ports and last in ports and last + 1 not in ports and str(first) not in ports
    assert PortRange.parse(str(ports)) == ports


@pytest.mark.parametrize("text", ["", "a", "20000-", "-20", "0-10", "5-70000", "20-10", "1-2-3", "1:5", "٣", "1.5"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(UserError, match="is no range of ports; write FIRST-LAST, from 1 to 65535, such as 20000-20099"):
        PortRange.parse(text)


@given(a=st.tuples(st.integers(1, 20), st.integers(0, 9)), b=st.tuples(st.integers(1, 20), st.integers(0, 9)))
def test_overlap(a: tuple[int, int], b: tuple[int, int]) -> None:
    ranges = [PortRange(first, first + more) for first, more in (a, b)]
    assert ranges[0].overlaps(ranges[1]) == bool(set(ranges[0]) & set(ranges[1]))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        ({"leader_port": -1}, "leader_port: must be a port from 1 to 65535, or 0 for any; got -1"),
        ({"store_ports": PortRange(5, 5)}, "store_ports: 5 is one port"),
        (
            {"rank_ports": PortRange(100, 199), "agent_ports": PortRange(199, 300)},
            r"agent_ports: 199-300 overlaps rank_ports \(100-199\); give each ports of its own",
        ),
        ({"leader_port": 150, "exchange_ports": PortRange(100, 199)}, r"100-199 overlaps leader_port \(150\)"),
    ],
)
def test_ports_that_cannot_be(make: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        NetworkConfig(**make)


def test_ports_that_others_have_and_ports_too_few() -> None:
    network = NetworkConfig(leader_port=7000, rank_ports=PortRange(9390, 9400), exchange_ports=PortRange(8100, 8101))
    network.check_apart({"gRPC": 9000})
    with pytest.raises(UserError, match="rank_ports: 9390-9400 contains 9400, which is the metrics port; give others"):
        network.check_apart({"gRPC": 9000, "metrics": 9400})
    with pytest.raises(UserError, match="leader_port: 7000 contains 7000, which is the HTTP port"):
        network.check_apart({"HTTP": 7000})
    network.check_room(2)
    with pytest.raises(
        UserError, match=r"exchange_ports: 8100-8101 has 2 ports, and 10\.0\.0\.3 has 4 ranks; widen it"
    ):
        network.check_room(4, "10.0.0.3")
    NetworkConfig().check_room(10_000)
    assert (network.leader_ports, NetworkConfig().leader_ports) == (PortRange(7000, 7000), None)


# ---- binding ----------------------------------------------------------------------------------------------------


def test_each_port_of_a_range_is_tried_in_turn() -> None:
    ports = range_of(3)
    with ExitStack() as held:
        found = [held.enter_context(bind_port(ports, LOCAL, "rank_ports")).getsockname()[1] for _ in ports]
        assert found == list(ports)
        with pytest.raises(UserError, match=f"no free port in {ports} of {LOCAL}; widen rank_ports"):
            bind_port(ports, LOCAL, "rank_ports")
        with pytest.raises(UserError, match=f"port {ports.first} of {LOCAL} is in use"):
            bind_port(PortRange(ports.first, ports.first), LOCAL, "rank_ports")
        other = held.enter_context(bind_port(None, LOCAL, "rank_ports"))
        assert other.getsockname()[1] not in ports


def test_a_port_is_ours_alone_at_once() -> None:
    (port,) = ports = range_of(1)
    with bind_port(ports, LOCAL, "rank_ports"), socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind((LOCAL, port))


def test_a_port_of_a_server_that_ended_is_free_again() -> None:
    ports = range_of(1)
    with bind_port(ports, LOCAL, "rank_ports") as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        accepted.close()  # It waits in TIME_WAIT.
        client.close()
    bind_port(ports, LOCAL, "rank_ports").close()


def test_only_the_given_address_listens() -> None:
    with bind_port(None, LOCAL, "rank_ports") as server, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.getsockname()[1]), 1)


def test_an_address_that_is_not_ours() -> None:
    for host in ("192.0.2.1", "no such host", "a..b"):
        with pytest.raises(UserError, match=f"{host} is no address of this host"):
            bind_port(PortRange(20000, 20001), host, "rank_ports")


def test_a_port_that_may_not_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(UserError, match=r"rank_ports: cannot listen on port 80 of 127\.0\.0\.1 \(Permission denied\)"):
        bind_port(PortRange(80, 81), LOCAL, "rank_ports")


def test_grpc_servers_share_a_range_and_no_port() -> None:
    ports = range_of(2)
    servers = [grpc.server(futures.ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)]) for _ in range(3)]
    found = [
        serve_on(ports, LOCAL, "rank_ports", lambda port, s=server: s.add_insecure_port(join_address(LOCAL, port)))
        for server in servers[:2]
    ]
    assert found == list(ports)
    with pytest.raises(UserError, match=f"no free port in {ports} of {LOCAL}; widen rank_ports"):
        serve_on(ports, LOCAL, "rank_ports", lambda port: servers[2].add_insecure_port(join_address(LOCAL, port)))
    assert serve_on(None, LOCAL, "rank_ports", lambda port: servers[2].add_insecure_port(join_address(LOCAL, port)))
    for server in servers:
        server.stop(0)


def test_who_was_quicker_keeps_the_port() -> None:
    ports, tried = range_of(3), []

    def bind(port: int) -> int:
        tried.append(port)
        if len(tried) == 1:
            raise RuntimeError("Failed to bind")
        return port

    assert serve_on(ports, LOCAL, "rank_ports", bind) == ports.first + 1
    assert tried == [ports.first, ports.first + 1]


# ---- addresses --------------------------------------------------------------------------------------------------


def test_this_host_has_a_loopback() -> None:
    found = interfaces()
    (name,) = (name for name, addresses in found.items() if LOCAL in addresses)
    assert address_of(name) == LOCAL
    assert interface_of(LOCAL) == name
    assert interface_of("127.0.0.2") == name, "all of 127.0.0.0/8 is there"
    assert not any(address.startswith("fe80") or "%" in address for each in found.values() for address in each)


def test_the_route_to_somewhere() -> None:
    assert route_address(LOCAL) == LOCAL
    assert route_address(f"{LOCAL}:6379") == LOCAL
    for addresses in interfaces().values():
        for address in addresses:
            assert route_address(address) == address
            if ":" in address:
                assert route_address(f"[{address}]:6379") == address
    with pytest.raises(UserError, match=r"a\.\.b is the name of no host"):
        route_address("a..b:6379")


def test_interfaces_and_addresses_that_are_not_there() -> None:
    with pytest.raises(UserError, match=r"has no 'eth99'; its interfaces are .*\(127\.0\.0\.1\)"):
        address_of("eth99")
    with pytest.raises(UserError, match=r"192\.0\.2\.1 is no address of .*; it has 127\.0\.0\.1 \("):
        interface_of("192.0.2.1")


def test_addresses_with_brackets() -> None:
    assert join_address("10.0.0.1", 80) == "10.0.0.1:80"
    assert join_address("fd00::1", 80) == join_address("[fd00::1]", 80) == "[fd00::1]:80"
    assert split_address("[fd00::1]:80") == ("fd00::1", 80)
    assert split_address("h3:80") == ("h3", 80)
    for text in ("h3", ":80", "h3:", "h3:http", "h3:70000", ""):
        with pytest.raises(UserError, match="is not HOST:PORT"):
            split_address(text)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_an_ipv6_address_binds(monkeypatch: pytest.MonkeyPatch) -> None:
    if not any("::1" in addresses for addresses in interfaces().values()):
        pytest.skip("this machine has no IPv6 loopback")
    for host in ("::1", "[::1]"):
        with bind_port(None, host, "rank_ports") as server:
            assert server.getsockname()[0] == "::1"
    assert interface_of("[::1]") == interface_of(LOCAL)
    assert route_address("::1") == "::1"
