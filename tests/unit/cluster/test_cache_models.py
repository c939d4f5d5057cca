"""`caravan cache` and fetched models: listed, verified, and removed only by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from tests.hub import SERVED, made_up_model
from workers.model_cache import ModelCache, hold
from workers.model_fetch import fetch
from workers.model_source import ModelSource


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default cache of models, with two in it and half of one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("workers.model_download.TICK_S", 0.02)
    folder = tmp_path / "caravan" / "models"
    for number in range(3):
        made_up_model(tmp_path / f"m{number}", 100_000, seed=number)
        fetched = fetch(ModelSource.parse(f"file://{tmp_path}/m{number}"), folder)
    (fetched / "caravan-manifest.json").rename(fetched / "caravan-journal.json")
    (fetched / "model.safetensors").rename(fetched / "model.safetensors.partial")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["cache", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code, out, _ = run(capsys, *arguments, "--json")
    return code, json.loads(out)


def model(folder: Path, number: int) -> Path:
    (found,) = (
        m.folder for m in ModelCache(folder).models() if m.manifest and m.manifest.source.endswith(f"m{number}")
    )
    return found


def test_list(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    used = hold(model(folder, 1))
    code, found = run_json(capsys, "list")
    assert (code, found["models_folder"], found["packs"]) == (0, str(folder), [])
    models = {one["model"].rpartition("/")[2]: one for one in found["models"]}
    assert {name: one["state"] for name, one in models.items()} == {"m0": "unused", "m1": "in use", "m2": "left over"}
    assert models["m0"]["name"] == model(folder, 0).name
    assert models["m0"]["bytes"] >= sum((model(folder, 0) / name).stat().st_size for name in SERVED)
    assert set(models["m0"]) == {"name", "bytes", "last_use", "state", "model", "version", "fetched"}
    out = run(capsys, "list")[1]
    assert f"{folder}: 3 models, " in out
    for text in ("in use", "unused", "left over", f"file://{tmp_path}/m0"):
        assert text in out
    assert used is not None
    used.close()


def test_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "verify")
    assert code == 0
    assert f"{model(folder, 0).name}: whole\n" in out
    assert f"{folder}: 2 models verified\n" in out, "half of one is not counted"
    with (model(folder, 0) / "model.safetensors").open("r+b") as file:
        file.seek(50_000)
        file.write(b"????")
    (model(folder, 0) / "config.json").unlink()
    code, out, error = run(capsys, "verify")
    assert code == 1
    damage = out.splitlines()
    assert any("not what was fetched: " in line and "config.json" in line and "model.safe" in line for line in damage)
    assert error.count("\n") == 1
    assert "1 of 2 models damaged; remove with `caravan cache clean NAME`" in error
    code, found = run_json(capsys, "verify", model(folder, 0).name)
    assert code == 1
    assert [one["name"] for one in found["models"]] == [model(folder, 0).name]
    assert {one["state"] for one in run_json(capsys, "list", model(folder, 0).name)[1]["models"]} == {"damaged"}


def test_clean_removes_whole_models_only_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, left = (model(folder, number) for number in range(3))
    code, out, _ = run(capsys, "clean")
    assert code == 0
    assert "removed 1 model, " in out
    assert f"{folder}: 2 models kept; `caravan cache clean NAME` removes one by name" in out
    assert (first.exists(), second.exists(), left.exists()) == (True, True, False)
    used = hold(second)
    code, found = run_json(capsys, "clean", first.name, second.name)
    assert (code, found["removed"], found["in_use"]) == (0, [first.name], [second.name])
    assert found["freed_bytes"] > 100_000
    assert used is not None
    used.close()
    assert run_json(capsys, "clean", second.name)[1]["removed"] == [second.name]
    assert list(folder.iterdir()) == []


def test_names_and_folders(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(run_json(capsys, "list", "--dir", str(folder))[1]["models"]) == 3
    code, _, error = run(capsys, "clean", "zz")
    assert (code, error.count("\n")) == (2, 1)
    assert "begins with 'zz', and no model; see `caravan cache list`" in error
    (tmp_path / "empty").mkdir()
    assert run_json(capsys, "list", "--dir", str(tmp_path / "empty"))[1]["models"] == []
