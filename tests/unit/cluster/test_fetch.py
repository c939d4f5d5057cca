"""`caravan fetch`, and how `caravan serve` comes to a model that is elsewhere."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

import workers
from cluster.cli import main
from cluster.config import NOT_FETCHED, load_config
from cluster.errors import ServerError, UsageError
from cluster.fetch import FetchDisplay, fetched_model, keep_model, models_folder
from tests.hub import Hub, environment, in_process, made_up_model, serving
from workers.model_cache import ModelCache
from workers.model_download import FetchProgress
from workers.model_source import ModelSource

NANO = Path(workers.__file__).parent / "nano"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with in_process(monkeypatch, tmp_path) as hub:
        yield hub


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["fetch", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ---- the command --------------------------------------------------------------------------------------------------


def test_it_prints_the_folder(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add("org/nano", NANO)
    code, out, error = run(capsys, "hf://org/nano")
    assert code == 0
    folder = Path(out.strip())
    assert folder.parent == tmp_path / "cache" / "caravan" / "models"
    assert (folder / "model.safetensors").stat().st_size == (NANO / "model.safetensors").stat().st_size
    assert not (folder / "heldout.txt").exists()
    assert "fetching hf://org/nano: " in error
    hub.requests.clear()
    assert run(capsys, "hf://org/nano")[:2] == (0, out)
    assert len(hub.requests) == 1


def test_another_folder(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add("org/nano", NANO)
    by_flag = run(capsys, "hf://org/nano", "--dir", str(tmp_path / "here"))[1]
    assert Path(by_flag.strip()).parent == tmp_path / "here"
    (tmp_path / "c.toml").write_text("[serve]\nmodels_cache_dir = 'there'\nmodels_cache_bytes = 1000")
    code, out, error = run(capsys, "hf://org/nano", "--config", str(tmp_path / "c.toml"))
    assert (code, out) == (1, "")
    assert f"and {tmp_path / 'there'} on " in error
    assert "may hold 0.0 MB; raise models_cache_bytes in [serve]" in error


def test_a_local_folder_is_only_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, str(NANO)) == (0, f"{NANO}\n", "")
    code, out, error = run(capsys, str(tmp_path / "none"))
    assert (code, out) == (2, "")
    assert "no such folder; give the folder of a Hugging Face checkpoint" in error


def test_a_model_that_does_not_fit_its_configuration(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/odd", made_up_model(tmp_path / "odd"))
    code, out, error = run(capsys, "hf://org/odd")
    assert (code, out) == (2, "")
    assert "is missing from the checkpoint" in error


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "the following arguments are required: MODEL"),
        (["hf:org/nano"], 2, "did you mean hf://org/nano?"),
        (["hf://org/none"], 2, "has no such model"),
        (["org/none"], 2, "for the Hugging Face hub write hf://org/none"),
        (["s4://x/y"], 2, "is no kind of URL"),
    ],
)
def test_bad_input_is_one_line(hub: Hub, capsys, arguments: list[str], code: int, says: str) -> None:
    found, out, error = run(capsys, *arguments)
    assert (found, out) == (code, "")
    assert says in error.splitlines()[-1]
    assert "Traceback" not in error


def test_offline(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text("[serve]\noffline = true")
    code, _, error = run(capsys, "hf://org/nano", "--config", str(tmp_path / "c.toml"))
    assert code == 2
    assert "is not in this host's cache, and offline mode is on" in error
    assert hub.requests == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_what_is_there(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with serving(Hub()) as hub:
        hub.add("org/model", made_up_model(tmp_path / "model", 4_000_000))
        hub.pause_s = 0.05
        env = {**os.environ, **environment(hub), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "cluster.cli", "fetch", "hf://org/model"]
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        while hub.served["model.safetensors"] < 800_000:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, error = process.communicate(timeout=20)
    assert process.returncode == code
    assert error.splitlines()[-1].startswith("caravan: stopped; what has been fetched of hf://org/model is kept")
    (partial,) = tmp_path.glob("cache/caravan/models/*/model.safetensors.partial")
    assert partial.stat().st_size > 200_000


def test_local_models_pay_for_no_client() -> None:
    code = (
        "import sys, cluster.serve, workers.model_fetch\n"
        "loaded = {'huggingface_hub', 'fsspec', 'aiohttp', 'torch', 'httpx2'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- configuration ------------------------------------------------------------------------------------------------


def test_the_model_of_a_configuration(tmp_path: Path) -> None:
    config = load_config({"model": "hf://org/Scout@v1"}, None)
    assert config.source == ModelSource.parse("hf://org/Scout@v1")
    assert config.engine.model_dir == config.router.model_dir == NOT_FETCHED
    assert config.router.model_name == "Scout"
    there = config.at(Path("/there"))
    assert (there.engine.model_dir, there.router.model_dir, there.router.model_name) == (
        Path("/there"),
        Path("/there"),
        "Scout",
    )
    assert load_config({"model": "hf://org/Scout", "model_name": "mine"}, None).router.model_name == "mine"
    file = tmp_path / "c.toml"
    file.write_text(
        "[serve]\nmodel = 's3://bucket/Scout'\noffline = true\nmodels_cache_dir = 'm'\nmodels_cache_bytes = 9"
    )
    config = load_config({}, file)
    assert (str(config.source), config.serve.offline, config.serve.models_cache_bytes) == ("s3://bucket/Scout", True, 9)
    assert models_folder(config) == tmp_path / "m"
    file.write_text("[serve]\nmodel = 'models/x'")
    assert load_config({}, file).engine.model_dir == tmp_path / "models/x"
    assert str(load_config({}, file).source) == str(tmp_path / "models/x")
    assert str(load_config({"model": "x"}, None).source) == str(Path("x").absolute())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model = 'hf:a/b'", "[serve]: model: hf:a/b is no folder; did you mean hf://a/b?"),
        ("model = 3", "[serve]: model must be a string, got 3"),
        ("offline = 1", "offline must be true or false, got 1"),
        ("models_cache_bytes = -1", "models_cache_bytes: must not be negative"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f"[serve]\n{text}")
    with pytest.raises(UsageError) as caught:
        load_config({}, file, NANO)
    assert says in str(caught.value)


def test_what_need_not_be_fetched(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config({"model": "hf://org/nano"}, None)
    with pytest.raises(UsageError, match="is not on this host yet; run `caravan fetch hf://org/nano` first"):
        fetched_model(config)
    hub.add("org/nano", NANO)
    folder = Path(run(capsys, "hf://org/nano")[1].strip())
    assert fetched_model(config) == folder
    commit = next(iter(hub.repositories["org/nano"].commits))
    assert str(config.at(folder).source) == f"hf://org/nano@{commit}", "what other hosts are told to fetch"
    assert config.at(folder).router.model_name == "nano"
    lock = keep_model(folder)
    assert lock is not None
    assert not ModelCache(folder.parent).remove(folder), "it is served"
    lock.close()
    assert ModelCache(folder.parent).remove(folder)
    with pytest.raises(ServerError, match="has been removed"):
        keep_model(folder)
    assert keep_model(NANO) is None


def test_lines_where_nobody_looks_at_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    display = FetchDisplay(Console(stderr=True), ModelSource.parse("hf://a/b"))
    for done in (0, 10**6, 2 * 10**6):
        display.show(FetchProgress(done, 2 * 10**6, "f", "trouble" if done == 10**6 else ""))
    display.close()
    assert capsys.readouterr().err == "caravan: fetching hf://a/b: 0.0 of 2.0 MB\ncaravan: trouble\n"
