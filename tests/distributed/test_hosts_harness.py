"""Hosts as namespaces: what they keep apart, what the harness can do to them, and that nothing of them is ever left."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.hosts import Host, HostNetwork, HostsError, Sizes, requires_hosts

pytestmark = [requires_hosts(), pytest.mark.hosts]

needs_nft = pytest.mark.skipif(not shutil.which("nft"), reason="no program `nft` (Debian package nftables)")
ROOT = Path(__file__).resolve().parents[2]
PORT = 7000
MIB = 2**20
BOUND_S = 10.0
ECHO = textwrap.dedent(
    f"""
    import socket, threading
    def answer(stream):
        while data := stream.recv(1024):
            stream.sendall(data)
    server = socket.create_server(("", {PORT}))
    print("ready", flush=True)
    while True:
        threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()
    """
)
# Round trips on one connection; a line says of each how it went.
ASK = textwrap.dedent(
    f"""
    import socket, sys, time
    host, rounds, bound, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
    try:
        stream = socket.create_connection((host, {PORT}), timeout=bound)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(rounds):
            began = time.perf_counter()
            stream.sendall(b"x")
            stream.recv(1)
            print(time.perf_counter() - began, flush=True)
            time.sleep(pause)
    except OSError as error:
        print(type(error).__name__)
    """
)


@pytest.fixture(scope="module")
def network() -> Iterator[HostNetwork]:
    with HostNetwork(3, client=True) as made:
        yield made


def serve(host: Host) -> subprocess.Popen[str]:
    process = host.popen([sys.executable, "-ISs", "-c", ECHO], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def ask(source: Host, target: Host | str, rounds: int = 1, bound_s: float = 5.0) -> list[str]:
    name = target if isinstance(target, str) else target.hostname
    done = source.run([sys.executable, "-ISs", "-c", ASK, name, str(rounds), str(bound_s), "0"])
    assert not done.returncode, done.stderr
    return done.stdout.split()


def keep_asking(source: Host, target: Host, bound_s: float) -> subprocess.Popen[str]:
    argv = [sys.executable, "-ISs", "-c", ASK, target.hostname, "1000", str(bound_s), "0.02"]
    process = source.popen(argv, stdout=subprocess.PIPE, text=True)
    assert float(process.stdout.readline()) < bound_s
    return process


def answers(source: Host, target: Host | str) -> bool:
    return "Error" not in ask(source, target)[-1]


def eventually(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + BOUND_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {BOUND_S} s: {what}"
        time.sleep(0.01)


def shell(host: Host, script: str) -> str:
    done = host.run(["bash", "-c", script])
    assert not done.returncode, done.stderr
    return done.stdout.strip()


# --- What is whose.


def test_each_host_has_its_own_name_address_and_interface(network: HostNetwork) -> None:
    everyone = [*network.hosts, network.client]
    assert [host.address for host in everyone] == ["10.77.0.1", "10.77.0.2", "10.77.0.3", "10.77.0.100"]
    for host in everyone:
        assert shell(host, "hostname") == host.hostname
        assert shell(host, "ls /sys/class/net").split() == ["eth0", "lo"]
        assert f"{host.address}/24" in shell(host, "ip -4 -o addr show dev eth0")
        for other in everyone:
            assert shell(host, f"getent ahostsv4 {other.hostname}").split()[0] == other.address


def test_hosts_see_their_own_processes_and_files_only(network: HostNetwork) -> None:
    first, second, _ = network
    process = first.popen(["sleep", "300"])
    assert [one.pid for one in first.processes()] == [process.pid]
    assert second.processes() == []
    assert "sleep" not in shell(second, "cat /proc/[0-9]*/comm")
    name = uuid.uuid4().hex
    for folder in ("/tmp", "/dev/shm", "$HOME", "$XDG_RUNTIME_DIR", "$XDG_CACHE_HOME"):
        shell(first, f"echo mine > {folder}/{name}; cat {folder}/{name}")
        assert shell(second, f"ls {folder}/{name} 2>&1 || true").endswith("No such file or directory")
    assert not Path("/tmp", name).exists() and not Path("/dev/shm", name).exists()
    assert first.path(f"/tmp/{name}").read_text() == "mine\n"
    process.kill()
    process.wait()


def test_nothing_outside_is_reached_and_nothing_of_the_machine_is_changed(network: HostNetwork) -> None:
    assert set(os.listdir("/sys/class/net")).isdisjoint({"br0", "port1", "port2", "port3"})
    assert all("10.77.0." not in line for line in subprocess.check_output(["ip", "addr"], text=True).splitlines())
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        for address in ("192.0.2.1", "10.77.0.254"):
            script = f"timeout 1 bash -c '</dev/tcp/{address}/{port}' 2>/dev/null && echo reached || true"
            assert shell(network[0], script) == ""


def test_a_programs_pid_signals_and_exit_code_are_its_own(network: HostNetwork) -> None:
    host = network[0]
    script = "trap 'echo asked; exit 7' TERM; echo ready; while :; do sleep 0.01; done"
    process = host.popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    assert psutil.Process(process.pid).name() == "bash"
    assert psutil.Process(process.pid).ppid() == os.getpid()
    process.terminate()
    assert process.communicate(timeout=10) == ("asked\n", None)
    assert process.returncode == 7
    assert host.run(["bash", "-c", "kill -SEGV $$"]).returncode == -signal.SIGSEGV
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        host.run(["no-such-program"])
    with pytest.raises(HostsError, match=r"host1.*exit 3: a reason"):
        host.run(["bash", "-c", "echo a reason >&2; exit 3"], check=True)
    with pytest.raises(subprocess.TimeoutExpired):
        host.run(["sleep", "300"], timeout=0.1)
    assert host.processes() == []


def test_file_systems_are_bounded_and_folders_can_be_shared(tmp_path: Path) -> None:
    (tmp_path / "given").write_text("to all")
    with HostNetwork(1, sizes=Sizes(home=MIB), shared=[tmp_path]) as network:
        host = network[0]
        done = host.run(["bash", "-c", "head -c 2000000 /dev/zero > $HOME/large"])
        assert done.returncode and "No space left on device" in done.stderr
        shell(host, "head -c 2000000 /dev/zero > /tmp/large")
        assert shell(host, f"cat {tmp_path}/given; echo back > {tmp_path}/taken") == "to all"
        roomy = network.add(sizes=Sizes())
        shell(roomy, "head -c 2000000 /dev/zero > $HOME/large")
    assert (tmp_path / "taken").read_text() == "back\n"


# --- What can be done to them.


def test_a_cut_is_silent_and_healed_without_a_trace(network: HostNetwork) -> None:
    first, second, third = network
    server = serve(second)
    assert answers(first, second)
    asking = keep_asking(first, second, bound_s=60)
    network.cut(second)
    # Neither refused nor unreachable, not for a new connection and not for one that stood.
    assert ask(first, second, bound_s=1.0) == ["TimeoutError"]
    assert asking.poll() is None
    assert "UP" in shell(second, "ip -br link show eth0")
    assert ask(first, third)[-1] == "ConnectionRefusedError"
    network.heal(second)
    assert answers(first, second)
    # One round took as long as the cut, which was at least the second above.
    assert any(float(line) > 1 for line in asking.stdout)
    for process in (asking, server):
        process.kill()
        process.communicate()


def test_a_flapping_host_ends_up_healed(network: HostNetwork) -> None:
    server = serve(network[1])
    network.flap(network[1], 3, 0.01, 0.01)
    assert answers(network[0], network[1])
    server.kill()
    server.communicate()


def test_a_frozen_host_does_nothing_and_goes_on_after(network: HostNetwork) -> None:
    first, second, _ = network
    server = serve(second)
    # One that forks all the time, and one that stood still before.
    busy = second.popen(["bash", "-c", "while :; do /bin/true; done"])
    already = second.popen(["sleep", "300"])
    already.send_signal(signal.SIGSTOP)
    eventually(lambda: psutil.Process(already.pid).status() == psutil.STATUS_STOPPED, "sleep is stopped")
    second.freeze()
    assert {one.status() for one in second.processes()} == {psutil.STATUS_STOPPED}
    assert len(second.processes()) >= 3
    assert ask(first, second, bound_s=0.5) == ["TimeoutError"]
    second.thaw()
    assert answers(first, second)
    assert psutil.Process(already.pid).status() == psutil.STATUS_STOPPED
    eventually(lambda: psutil.Process(busy.pid).status() != psutil.STATUS_STOPPED, "bash goes on")
    for process in (server, busy, already):
        process.kill()
        process.communicate()


def test_a_removed_host_is_gone_without_a_word_and_another_can_come() -> None:
    with HostNetwork(2) as network:
        first, second = network
        serve(second)
        asking = keep_asking(first, second, bound_s=1.0)
        # A daemon of a daemon's, in a session of its own, frozen.
        second.run(["setsid", "--fork", "sleep", "300"], stdout=None, stderr=None)
        second.freeze()
        living = second.processes()
        assert len(living) == 2
        network.remove(second)
        assert not any(process.is_running() for process in living)
        out, _ = asking.communicate(timeout=20)
        assert out.split()[-1] == "TimeoutError"
        assert network.hosts == [first]
        with pytest.raises(HostsError, match=r"host2 is gone"):
            second.run(["true"])
        third = network.add()
        assert (third.hostname, third.address) == ("host3", "10.77.0.3")
        serve(third)
        assert answers(first, third)


@needs_nft
def test_a_blocked_port_answers_nothing_to_others(network: HostNetwork) -> None:
    first, second, _ = network
    server = serve(second)
    second.block_ports([22, (6990, 7010)])
    assert ask(first, second, bound_s=0.5) == ["TimeoutError"]
    assert answers(second, second)
    second.unblock_ports()
    assert answers(first, second)
    server.kill()
    server.communicate()


def test_interfaces_that_lead_nowhere_and_addresses_that_are_anothers() -> None:
    with HostNetwork(2) as network:
        first, second = network
        first.add_interface("eth1", "10.78.0.1/24")
        assert "10.78.0.1/24" in shell(first, "ip -4 -o addr show dev eth1")
        assert shell(first, "ls /sys/class/net").split() == ["eth0", "eth1", "eth1-end", "lo"]
        assert ask(second, "10.78.0.1", bound_s=0.5)[-1] == "OSError"  # No route to there.
        second.add_address(first.address)
        serve(second)
        # It takes the address for its own; everybody else goes to whose it is.
        assert answers(second, first)
        with HostNetwork(1) as other:  # And another network with the same addresses is another world.
            assert not other[0].processes()


@needs_nft
def test_what_hosts_send_to_elsewhere_is_lost_and_named() -> None:
    send = "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.8', 53))"
    with HostNetwork(2, outside=True) as network:
        first, second = network
        serve(second)
        assert answers(first, second)
        assert network.outside_attempts() == []
        assert ask(first, "192.0.2.7", bound_s=0.5) == ["TimeoutError"]
        assert not second.run([sys.executable, "-ISs", "-c", send]).returncode
        assert network.outside_attempts() == ["10.77.0.1 tcp 192.0.2.7:7000", "10.77.0.2 udp 192.0.2.8:53"]


def test_frames_are_delayed_and_lost_as_told(network: HostNetwork) -> None:
    first, second, third = network
    server = serve(second)
    assert network.delay(first, 20) in ("netem", "delay line")
    network.delay(second, 30)
    least = min(map(float, ask(first, second, rounds=10)))
    # At least what was asked for; how much more is the machine's load.
    assert least >= 0.050
    assert min(map(float, ask(third, second, rounds=10))) >= 0.030
    network.cut(first)
    assert ask(first, second, bound_s=0.5) == ["TimeoutError"]
    # What is cut stays so, whatever its delay; another host's is another matter.
    network.delay(first, 0)
    assert ask(first, second, bound_s=0.5) == ["TimeoutError"]
    network.delay(first, 1)
    assert ask(first, second, bound_s=0.5) == ["TimeoutError"]
    assert answers(third, second)
    network.heal(first)
    assert answers(first, second)
    network.delay(first, 0, loss=1.0)
    assert ask(first, second, bound_s=0.5) == ["TimeoutError"]
    network.delay(first, 0)
    network.delay(second, 0)
    assert min(map(float, ask(first, second, rounds=50))) < 0.030
    with pytest.raises(HostsError, match="-1 ms"):
        network.delay(first, -1)
    server.kill()
    server.communicate()
