"""What a server does to its host: ports, processes, its state file and its metrics."""

import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from cluster import processes
from cluster.display import LoadingDisplay
from cluster.errors import UsageError, one_sentence
from cluster.metrics_endpoint import MetricsEndpoint
from cluster.ports import check_listens, check_port, free_ports
from cluster.state_file import ServerState, running_servers, this_server, write_state
from protos import gang_pb2


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UsageError, match=f"grpc-port: port {port} of 127.0.0.1 is in use"):
            check_port("127.0.0.1", port, "grpc-port")
        check_listens(f"127.0.0.1:{port}", "ray-address")
    check_port("127.0.0.1", port, "grpc-port")
    with pytest.raises(UsageError, match="nothing can be reached"):
        check_listens(f"127.0.0.1:{port}", "ray-address")


@pytest.mark.parametrize("address", ["here", ":1", "h:", "ray://h:1x"])
def test_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="must be HOST:PORT or auto"):
        check_listens(address, "ray-address")


def test_foreign_host() -> None:
    with pytest.raises(UsageError, match=r"host: 192\.0\.2\.77 is no address of this machine"):
        check_port("192.0.2.77", 9000, "grpc-port")


def test_free_ports() -> None:
    assert len(set(free_ports(5))) == 5


PLAIN = "import time; time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
# Its child outlives it.
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {PLAIN!r}], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(child.pid)
"""
# In a process of its own: it ends every process below it.
ENDS_ALL = f"""
import subprocess, sys, time
from cluster.processes import adopt_orphans, descendants, end_descendants

def start(code, **options):
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

adopt_orphans()
plain, stubborn, parent = start({PLAIN!r}), start({STUBBORN!r}), start({PARENT!r})
stubborn.stdout.readline()
orphan = int(parent.stdout.readline())
parent.wait()
pids = {{plain.pid, stubborn.pid, orphan}}
assert {{process.pid for process in descendants()}} == pids
started = time.monotonic()
assert end_descendants(grace_s=0.3, bound_s=5) == []
assert time.monotonic() - started < 4
print(*pids)
"""


def test_descendants_are_ended_whatever_they_do() -> None:
    done = subprocess.run([sys.executable, "-c", ENDS_ALL], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert not any(psutil.pid_exists(int(pid)) for pid in done.stdout.split())


def test_nothing_to_end() -> None:
    code = "from cluster.processes import end_descendants; assert end_descendants(0.1, 1) == []"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert isinstance(processes.descendants(), list)


@pytest.fixture
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def test_state_of_a_running_server(runtime_dir: Path) -> None:
    state = this_server("127.0.0.1:1901", "127.0.0.1:1902")
    file = write_state(state)
    assert file.is_relative_to(runtime_dir)
    assert state in running_servers()
    assert file.parent.stat().st_mode & 0o077 == 0
    file.unlink()
    assert state not in running_servers()


def test_state_of_a_dead_server_is_forgotten(runtime_dir: Path) -> None:
    # The same number, another process: it started long before this one.
    reused = ServerState("127.0.0.1:1903", "127.0.0.1:1904", os.getpid(), psutil.Process().create_time() - 1000)
    file = write_state(reused)
    assert reused not in running_servers()
    assert not file.exists()
    (runtime_dir / "caravan" / "broken.json").write_text("{")
    running_servers()


@pytest.mark.parametrize(
    ("server", "client", "reaches"),
    [
        ("127.0.0.1:9000", "127.0.0.1:9000", True),
        ("127.0.0.1:9000", "localhost:9000", True),
        ("0.0.0.0:9000", "127.0.0.1:9000", True),
        ("127.0.0.1:9000", "127.0.0.1:9001", False),
        ("127.0.0.1:9000", "10.0.0.1:9000", False),
    ],
)
def test_which_server_an_address_reaches(server: str, client: str, reaches: bool) -> None:
    assert ServerState(server, "", 1, 0.0).answers_at(client) is reaches


WRITER = """
import sys, time
from prometheus_client import Counter, Gauge
Counter("caravan_test_tokens", "Tokens.").inc(3)
Gauge("caravan_test_running", "Sequences.", multiprocess_mode="livesum").set(2)
print("up", flush=True)
sys.stdin.read()
"""


def test_metrics_of_several_processes_add_up(tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    (folder / "counter_1.db").write_bytes(b"of an earlier server")
    (port,) = free_ports(1)
    endpoint = MetricsEndpoint("127.0.0.1", port, folder)
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "up\n"
        assert metrics(port) == {"caravan_test_tokens_total": 6, "caravan_test_running": 4}
        writers[0].communicate("")
        assert metrics(port) == {"caravan_test_tokens_total": 6, "caravan_test_running": 2}, "counters stay, gauges go"
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
        endpoint.close()
    check_port("127.0.0.1", port, "metrics-port")


def metrics(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.split() for line in lines)}


def test_metrics_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(UsageError, match="metrics-port: cannot listen"):
            MetricsEndpoint("127.0.0.1", listener.getsockname()[1], tmp_path / "metrics")


def test_display_without_a_terminal_says_each_stage_once(tmp_path: Path) -> None:
    from rich.console import Console

    with (tmp_path / "out").open("w") as file:
        display = LoadingDisplay(Console(file=file))
        display.stage("starting Ray")
        for stage, state, read in (
            ("ranks placed", "starting", 0),
            ("weights loaded", "loading", 5),
            ("weights loaded", "loading", 9),
            ("first exchange", "ready", 10),
            ("", "ready", 10),
        ):
            loading = gang_pb2.Loading(bytes_read=read * 10**6, bytes_total=10**7)
            view = gang_pb2.GangView(
                state="starting" if stage else "ready",
                stage=stage,
                ranks=[gang_pb2.RankView(rank=rank, state=state, loading=loading) for rank in range(2)],
            )
            display.view(view)
            display.view(view)
        display.note("rank 1 died")
        display.note("rank 1 died")
        display.close()
    assert (tmp_path / "out").read_text().splitlines() == [
        "starting Ray",
        "5/8 starting 2 ranks",
        "6/8 loading weights",
        "8/8 exchanging the first rows",
        "2 ranks are ready; they read 20.0 MB of weights",
        "caravan: rank 1 died",
    ]


def test_display_of_packing_and_of_what_an_operator_should_know(tmp_path: Path) -> None:
    from rich.console import Console

    with (tmp_path / "out").open("w") as file:
        display = LoadingDisplay(Console(file=file))
        for loading in (
            gang_pb2.Loading(bytes_packed=5, bytes_to_pack=30 * 10**6),
            gang_pb2.Loading(bytes_packed=20 * 10**6, bytes_to_pack=30 * 10**6),
            gang_pb2.Loading(
                bytes_read=5, bytes_total=10**7, bytes_packed=30 * 10**6, bytes_to_pack=30 * 10**6, note="no room"
            ),
        ):
            ranks = [gang_pb2.RankView(rank=rank, state="loading", loading=loading) for rank in range(2)]
            display.view(gang_pb2.GangView(state="starting", stage="weights loaded", ranks=ranks))
        display.close()
    assert (tmp_path / "out").read_text().splitlines() == [
        "6/8 packing 30.0 MB of weights, once for all starts with this checkpoint",
        "caravan: no room",
        "6/8 loading weights",
    ]


def test_one_sentence() -> None:
    assert one_sentence("a\n  b\tc") == "a b c"
    assert len(one_sentence("x" * 10_000, limit=100)) == 100
