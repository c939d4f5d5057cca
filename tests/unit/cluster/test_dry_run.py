"""`caravan serve --dry-run`: the plan and what it takes, or one sentence and exit code 2; nothing is started."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import dry_run
from cluster.cli import main
from cluster.config import load_config
from cluster.default_model import default_model_dir
from cluster.footprint import Footprint, runs
from cluster.placement import HostOffer, PlacementRequest, first_expert_map, plan
from cluster.ports import free_ports
from workers.checkpoint_check import tensor_shapes
from workers.config import EngineConfig
from workers.model_config import ModelConfig

MODEL = ModelConfig.from_folder(default_model_dir())
HOSTS = [
    HostOffer("n1", "10.0.0.1", "head", 3, 0, 4, 0, labels={"zone": "a"}, is_head=True),
    HostOffer("n2", "10.0.0.2", "two", 4, 4, 4, 4, "H100", {"zone": "a"}),
    HostOffer("n3", "10.0.0.3", "three", 4, 4, 4, 4, "H100", {"zone": "b"}),
]


@pytest.fixture
def ports() -> list[str]:
    flags = ("--grpc-port", "--http-port", "--metrics-port")
    return [word for flag, port in zip(flags, free_ports(3), strict=True) for word in (flag, str(port))]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray of three hosts at 10.0.0.1:6379."""
    monkeypatch.setattr(dry_run, "hosts_at", lambda address: list(HOSTS))
    monkeypatch.setattr(dry_run, "check", lambda config: None)


def cells(text: str, header: str) -> list[list[str]]:
    """Rows of the table whose header begins so."""
    table = text[text.index(f"┃ {header} ") :].partition("└")[0]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in table.splitlines() if line[:1] == "│"]


def test_a_server_of_this_host_alone(ports: list[str]) -> None:
    command = [sys.executable, "-m", "cluster.cli", "serve", "--dry-run", "--ranks", "3", *ports]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 ranks on this host, with a Ray of its own; nothing was started" in done.stdout
    assert [row[:4] for row in cells(done.stdout, "rank")] == [
        ["0", "127.0.0.1", "CPU", "0-42"],
        ["1", "127.0.0.1", "CPU", "43-85"],
        ["2", "127.0.0.1", "CPU", "86-127"],
    ]
    assert ["gRPC", "127.0.0.1", ports[1]] in cells(done.stdout, "port of")
    assert "exchange" not in done.stdout


def test_a_server_of_several_hosts(
    cluster: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, ports: list[str]
) -> None:
    file = tmp_path / "caravan.toml"
    file.write_text(
        "[engine]\ndevice = 'cpu'\n[placement]\nhosts = 2\n[network]\ninterface = 'eth1'\nrank_ports = '20000-20003'\n"
    )
    flags = ["--ray-address", "10.0.0.1:6379", "--ranks", "5", "--config", str(file), *ports]
    assert main(["serve", "--dry-run", *flags]) == 0
    text = capsys.readouterr().out
    assert "5 ranks on 2 hosts of the Ray at 10.0.0.1:6379" in text
    assert [row[:4] for row in cells(text, "host")] == [
        ["10.0.0.2", "two", "0-2", "3 of 4 free CPUs"],
        ["10.0.0.3", "three", "3-4", "2 of 4 free CPUs"],
    ]
    assert [row[1] for row in cells(text, "rank")] == ["10.0.0.2"] * 3 + ["10.0.0.3"] * 2
    told = {tuple(row) for row in cells(text, "port of")}
    assert ("leader", "10.0.0.1 (eth1)", "any that is free") in told
    assert ("rank", "each host (eth1)", "20000-20003") in told
    assert ("exchange", "each host (eth1)", "any that is free") in told


def test_gpus_are_taken_where_every_rank_gets_one(
    cluster: None, capsys: pytest.CaptureFixture[str], ports: list[str]
) -> None:
    assert main(["serve", "--dry-run", "--ray-address", "10.0.0.1:6379", "--ranks", "8", *ports]) == 0
    text = capsys.readouterr().out
    assert {row[2] for row in cells(text, "rank")} == {"GPU"}
    assert cells(text, "host")[0][3] == "4 of 4 free CPUs, 4 of 4 free GPUs H100"
    assert "packs" not in text, "ranks on GPUs share nothing"


@pytest.mark.parametrize(
    ("table", "ranks", "says"),
    [
        ("[engine]\ndevice = 'cpu'", "12", "no room for 12 ranks of 1 CPU; hosts: 10.0.0.2 (two) has room for 4;"),
        ("[placement]\naccelerator = 'A100'", "2", "10.0.0.2 (two) has accelerator H100"),
        ("[placement]\nlabels = { zone = 'b' }", "5", "10.0.0.1 (head) has label zone = 'a', not 'b'"),
        ("[network]\nrank_ports = '20000-20002'", "4", "20000-20002 has 3 ports, and 10.0.0.2 has 4 ranks; widen it"),
        ("[placement]\nhosts = 3", "2", "hosts: 3 are more than the 2 ranks"),
    ],
)
def test_a_refusal_is_one_sentence(
    cluster: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    ports: list[str],
    table: str,
    ranks: str,
    says: str,
) -> None:
    file = tmp_path / "caravan.toml"
    file.write_text(table)
    flags = ["--ray-address", "10.0.0.1:6379", "--ranks", ranks, "--config", str(file), *ports]
    assert main(["serve", "--dry-run", *flags]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_what_a_server_would_refuse_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--dry-run", "--model", "/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err
    assert main(["serve", "--dry-run", "--ranks", "1000"]) == 2
    assert "1000 are more than the model's 128 experts" in capsys.readouterr().err


# ---- bytes ------------------------------------------------------------------------------------------------------


def footprint(ranks: int, hosts: list[HostOffer], **engine: object) -> Footprint:
    found = plan(PlacementRequest(ranks, gpus=1 if engine.get("device") == "cuda" else 0), hosts)
    config = EngineConfig(model_dir=default_model_dir(), **engine)
    return Footprint(MODEL, config, found, first_expert_map(MODEL, range(ranks)))


def weights(experts: int) -> int:
    """Elements of the model with so many of its experts."""
    total = 0
    for name, shape in tensor_shapes(MODEL).items():
        rows = experts if ".experts." in name else shape[0]
        count = rows
        for size in shape[1:]:
            count *= size
        total += count
    return total


def test_bytes_of_ranks_and_hosts() -> None:
    shared = footprint(8, HOSTS, dtype="float32", kv_memory_bytes=1000)
    assert shared.is_shared
    assert shared.pack_bytes == weights(128) * 4
    assert shared.rank(0).weights_bytes == weights(16) * 4
    assert shared.host("10.0.0.2").weights_bytes == weights(64) * 4, "what its four ranks share counts once"
    assert (shared.rank(0).kv_bytes, shared.host("10.0.0.2").kv_bytes) == (1000, 4000)
    alone = footprint(8, HOSTS, dtype="bfloat16", share_weights=False)
    assert alone.host("10.0.0.2").weights_bytes == 4 * weights(16) * 2
    on_gpus = footprint(8, HOSTS, dtype="bfloat16", device="cuda")
    assert not on_gpus.is_shared
    assert on_gpus.host("10.0.0.2").weights_bytes == 4 * weights(16) * 2


def test_the_checkpoint_as_it_lies_on_disk() -> None:
    files = default_model_dir().glob("*.safetensors")
    assert footprint(1, HOSTS).checkpoint_bytes == sum(file.stat().st_size for file in files)


def test_runs() -> None:
    assert runs([]) == ""
    assert runs([3]) == "3"
    assert runs([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_plans_of_a_configuration_are_those_of_its_tables() -> None:
    config = load_config({"ray_address": "auto", "ranks": 4}, None, default_model_dir())
    found = dry_run.plan_of(config, HOSTS)
    assert found.request == PlacementRequest(4, gpus=1)
    assert re.fullmatch(r"(10\.0\.0\.2 ?)+", " ".join(found.addresses))
