"""The fingerprint that hosts compare: the same for the same model anywhere, another for another one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub import made_up_model
from workers.content_fingerprint import content_fingerprint
from workers.errors import UserError


def poke(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        before = file.read(1)
        file.seek(offset)
        file.write(bytes([before[0] ^ 1]))


def rewrite_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama4_text", "rope_theta": 1}))


def as_another_type(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"U8"', b'"I8"'))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: poke(folder / "model.safetensors", 300),
        lambda folder: poke(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2 + 1),
        as_another_type,
        rewrite_config,
        lambda folder: poke(folder / "tokenizer.json", 3000),
        lambda folder: (folder / "tokenizer_config.json").write_text("{}"),
        lambda folder: (folder / "chat_template.jinja").write_text("another"),
        lambda folder: (folder / "generation_config.json").unlink(),
        lambda folder: made_up_model(folder, seed=1),
        lambda folder: (folder / "model.safetensors").rename(folder / "other.safetensors"),
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "more.safetensors"),
    ],
)
def test_what_changes_it(tmp_path: Path, change: Callable[[Path], object]) -> None:
    folder = made_up_model(tmp_path / "model")
    before = content_fingerprint(folder)
    assert len(before) == 64
    change(folder)
    assert content_fingerprint(folder) != before


def test_what_does_not(tmp_path: Path) -> None:
    folder = made_up_model(tmp_path / "model", shards=3)
    other = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    os.utime(other / "config.json", (1, 1))
    (other / "README.md").unlink()
    (other / "caravan-manifest.json").write_text("{}")
    (other / ".lock").write_text("")
    assert content_fingerprint(other) == content_fingerprint(folder)


def test_a_hole_is_found(tmp_path: Path) -> None:
    folder = made_up_model(tmp_path / "model", 2_000_000)
    before = content_fingerprint(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(800_000)
        file.write(bytes(100_000))
    assert content_fingerprint(folder) != before


def test_what_cannot_be_read(tmp_path: Path) -> None:
    folder = made_up_model(tmp_path / "model", shards=2)
    os.truncate(folder / "model-00002-of-00002.safetensors", 1000)
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: is truncated"):
        content_fingerprint(folder)
    with pytest.raises(UserError, match="cannot be read"):
        content_fingerprint(tmp_path / "nowhere")
