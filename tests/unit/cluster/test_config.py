"""Configuration of a deployment: flags over file over defaults, and what the user is told when it cannot be."""

from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.errors import UsageError
from cluster.network import NetworkConfig, PortRange
from cluster.placement import PlacementConfig

MODEL = Path("/models/maverick")


def write(folder: Path, text: str) -> Path:
    file = folder / "caravan.toml"
    file.write_text(text)
    return file


def test_defaults() -> None:
    config = load_config({}, None, MODEL)
    assert (config.serve.ranks, config.serve.dtype, config.engine.model_dir) == (4, "auto", MODEL)
    assert (config.grpc_address, config.http_address) == ("127.0.0.1:9000", "127.0.0.1:8000")
    assert config.metrics_address == "127.0.0.1:9400"
    assert (config.router.grpc_port, config.router.http_port) == (9000, 8000)
    assert config.router.model_dir == MODEL
    assert config.router.host == "127.0.0.1"


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        [serve]
        model = "weights"
        ranks = 8
        dtype = "bfloat16"
        [engine]
        block_size = 32
        exchange_timeout_s = 5
        [router]
        model_name = "nano"
        [gang]
        restarts = 0
        """,
    )
    config = load_config({"ranks": 2, "dtype": None}, file, MODEL)
    assert config.serve.ranks == 2
    assert config.engine.dtype == "bfloat16"
    assert config.engine.model_dir == tmp_path / "weights", "relative to the file"
    assert (config.engine.block_size, config.engine.exchange_timeout_s) == (32, 5.0)
    assert config.router.model_name == "nano"
    assert config.leader.restarts == 0


def test_the_prefix_cache(tmp_path: Path) -> None:
    off = write(tmp_path, "[serve]\nprefix_cache = false\n[engine]\nprefill_step_ratio = 3")
    assert load_config({}, None, MODEL).engine.prefix_cache
    config = load_config({}, off, MODEL)
    assert (config.engine.prefix_cache, config.engine.prefill_step_ratio) == (False, 3.0)


def test_the_served_name(tmp_path: Path) -> None:
    file = write(tmp_path, "[router]\nmodel_name = 'nano'")
    assert load_config({}, None, MODEL).router.model_name == "maverick"
    assert load_config({"model_name": "mav"}, None, MODEL).router.model_name == "mav"
    assert load_config({"model_name": "mav"}, file, MODEL).router.model_name == "mav"


def test_placement_and_network(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        [serve]
        ray_address = "auto"
        [placement]
        hosts = 2
        accelerator = "H100"
        labels = { zone = "a", "ray.io/market-type" = "spot" }
        [network]
        interface = "eth1"
        leader_port = 20000
        rank_ports = "20001-20016"
        """,
    )
    config = load_config({}, file, MODEL)
    assert config.placement == PlacementConfig(2, "H100", {"zone": "a", "ray.io/market-type": "spot"})
    assert config.network == NetworkConfig("eth1", 20000, PortRange(20001, 20016))
    bare = load_config({}, None, MODEL)
    assert (bare.placement, bare.network) == (PlacementConfig(), NetworkConfig())


def test_ipv6_host() -> None:
    config = load_config({"host": "::1"}, None, MODEL)
    assert config.grpc_address == "[::1]:9000"
    assert config.router.host == "[::1]"


def test_the_cache_of_packed_weights(tmp_path: Path) -> None:
    engine = load_config({}, None, MODEL).engine
    assert (engine.share_weights, engine.weights_cache_dir, engine.weights_cache_bytes) == (True, None, 0)
    file = write(tmp_path, "[engine]\nshare_weights = false\nweights_cache_dir = 'w'\nweights_cache_bytes = 5")
    engine = load_config({}, file, MODEL).engine
    assert (engine.share_weights, engine.weights_cache_bytes) == (False, 5)
    assert engine.weights_cache_dir == tmp_path / "w", "relative to the file"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[engine]\nblok_size = 16", r"\[engine\]: unknown key 'blok_size'; did you mean 'block_size'"),
        ("[serve]\ngrpc-port = 1", "unknown key 'grpc-port'; did you mean 'grpc_port'"),
        ("[engine]\nmodel_dir = 'x'", "unknown key 'model_dir'"),
        ("[engin]\nblock_size = 16", "unknown table 'engin'; did you mean 'engine'"),
        ("ranks = 4", "unknown table 'ranks'"),
        ("serve = 4", r"must be a table, written \[serve\]"),
        ("[serve]\nranks = '4'", "ranks must be a whole number, got '4'"),
        ("[serve]\nranks = true", "ranks must be a whole number, got True"),
        ("[serve]\nranks = 0", "ranks: must be at least 1"),
        ("[serve]\ndtype = 'int8'", "dtype: 'int8' is not one of"),
        ("[serve]\ngrpc_port = 9400", "metrics-port: 9400 is the gRPC port too"),
        ("[serve]\nhttp_port = 9000", "http-port: 9000 is the gRPC port too"),
        ("[serve]\nmetrics_port = 8000", "metrics-port: 8000 is the HTTP port too"),
        ("[serve]\nrouters = 0", "routers: must be at least 1"),
        ("[router]\nhttp_port = 1", "unknown key 'http_port'"),
        ("[serve]\ngrpc_port = 0", "grpc-port: must be a port from 1 to 65535"),
        ("[serve]\nhost = ''", "host: must not be empty"),
        ("[engine]\nblock_size = 0", "block_size: must be at least 1"),
        ("[engine]\nweights_cache_bytes = -1", "weights_cache_bytes: must not be negative"),
        ("[engine]\nweights_cache_dir = 3", "weights_cache_dir must be a string"),
        ("[router]\nstream_stall_s = -1", "stream_stall_s"),
        ("[gang]\njoin_timeout_s = 0", "join_timeout_s: must be positive"),
        ("[serve\n", "is not valid TOML"),
        ("[placement]\nhosts = -1", "hosts: must be 1 or more"),
        ("[placement]\nhosts = 5", "hosts: 5 are more than the 4 ranks"),
        ("[placement]\nhosts = 2", "hosts: without ray_address, all ranks are on this host; start Ray on every host"),
        ("[placement]\nlabels = 'zone=a'", "labels must be a table"),
        ("[placement]\nlabels = { zone = 1 }", "labels.zone must be a string, got 1"),
        ("[placement]\nhost = 2", "unknown key 'host'; did you mean 'hosts'"),
        ("[network]\ninterface = 'eth1'", "interface: without ray_address, all ranks are on this host"),
        ("[network]\nrank_ports = 20000", 'rank_ports must be a string such as "20000-20099", got 20000'),
        ("[network]\nrank_ports = '20000:20099'", "rank_ports: '20000:20099' is no range of ports; write FIRST-LAST"),
        ("[network]\nrank_ports = '20000-20002'", "rank_ports: 20000-20002 has 3 ports, and this host has 4 ranks"),
        ("[network]\nexchange_ports = '8990-9009'", "exchange_ports: 8990-9009 contains 9000, which is the gRPC port"),
        ("[network]\nleader_port = 70000", "leader_port: must be a port from 1 to 65535"),
        ("[network]\nrank_ports = '1-9'\nagent_ports = '9'", "agent_ports: 9 overlaps rank_ports"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(UsageError, match=says) as caught:
        load_config({}, file, MODEL)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such configuration file"):
        load_config({}, tmp_path / "none.toml", MODEL)


def test_no_model() -> None:
    with pytest.raises(UsageError, match="--model"):
        load_config({}, None)
