"""`caravan cache`: what it lists, what it finds damaged, what it removes, and what it says."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from workers.packed_cache import PackedCache
from workers.packed_file import PackFile, Writer, pack_name, plan_header
from workers.packed_layout import PackedTensor

TENSORS = [PackedTensor("embedding", (50, 16), ()), PackedTensor("norm", (16,), ())]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "caravan" / "weights"


def put(folder: Path, number: int) -> Path:
    fingerprint = f"{number:02x}" * 16

    def fill(writer: Writer, tick: Callable[[], None]) -> None:
        for tensor in TENSORS:
            writer.write(tensor.name, memoryview(bytes(tensor.numel * 4)))

    pack = PackedCache(folder).get(
        pack_name(fingerprint, "float32"),
        lambda: plan_header(TENSORS, "float32", fingerprint, f"/models/model-{number}"),
        fill,
    )
    pack.close()
    return pack.path


def damage(path: Path, tensor: str) -> None:
    pack = PackFile(path)
    offset = pack.header.tensors[tensor].offset
    pack.close()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x01")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["cache", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code, out, _ = run(capsys, *arguments, "--json")
    (line,) = out.splitlines()
    return code, json.loads(line)


def test_no_cache_yet(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "list") == (0, f"{folder}: 0 packs, 0.0 MB\n", "")
    assert run(capsys, "verify") == (0, f"{folder}: 0 packs verified\n", "")
    assert run(capsys, "clean") == (0, f"{folder}: removed 0 packs, 0.0 MB\n", "")
    assert not folder.exists()


def test_list(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    first, second, third = (put(folder, number) for number in (1, 2, 3))
    os.utime(second, (10**9, 10**9))
    third.write_bytes(b"?")
    (folder / f"{first.stem[:-1]}9.partial").touch()
    used = PackFile(first)
    code, found = run_json(capsys, "list")
    assert code == 0
    assert found["folder"] == str(folder)
    packs = {pack["name"]: pack for pack in found["packs"]}
    assert found["packs"][-1]["name"] == second.name, "the one used longest ago is last"
    assert {name: pack["state"] for name, pack in packs.items()} == {
        first.name: "in use",
        second.name: "unused",
        third.name: "damaged",
        f"{first.stem[:-1]}9.partial": "left over",
    }
    assert packs[second.name] == {
        "name": second.name,
        "bytes": second.stat().st_size,
        "last_use": 10**9,
        "state": "unused",
        "checkpoint": "/models/model-2",
        "dtype": "float32",
        "created": packs[second.name]["created"],
    }
    assert packs[third.name]["checkpoint"] is None
    code, out, _ = run(capsys, "list")
    assert code == 0
    for text in (
        "010101010101",
        "model-2",
        "float32",
        "in use",
        "unused",
        "damaged",
        "left over",
        f"{folder}: 4 packs",
    ):
        assert text in out
    used.close()


def test_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, short = (put(folder, number) for number in (1, 2, 3))
    assert run(capsys, "verify")[0] == 0
    damage(bad, "norm")
    short.write_bytes(short.read_bytes()[:-1])
    code, out, error = run(capsys, "verify")
    assert code == 1
    assert f"{good.name}: whole\n" in out
    assert f"{bad.name}: not what was packed: norm\n" in out
    assert f"{short.name}: it is {short.stat().st_size} bytes long where its header says" in out
    assert error.startswith("caravan: 2 of 3 packs are damaged; remove them with `caravan cache clean NAME`")
    assert error.count("\n") == 1
    code, found = run_json(capsys, "verify", bad.name[:10])
    assert code == 1
    assert found["packs"] == [{"name": bad.name, "damage": "not what was packed: norm"}]
    assert run_json(capsys, "verify", good.name)[0] == 0


def test_clean(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [put(folder, number) for number in range(4)]
    (folder / "left.partial").write_bytes(bytes(10))
    (folder / "notes.txt").write_text("not ours")
    used = PackFile(paths[0])
    size = paths[0].stat().st_size
    code, found = run_json(capsys, "clean", paths[1].name[:12])
    assert (code, found) == (
        0,
        {"folder": str(folder), "freed_bytes": size, "removed": [paths[1].name], "in_use": []},
    )
    code, out, _ = run(capsys, "clean")
    assert code == 0
    assert out == f"{folder}: removed 3 packs, {(2 * size + 10) / 1e6:.1f} MB; 1 in use are kept\n"
    assert sorted(os.listdir(folder)) == sorted([paths[0].name, "notes.txt"])
    used.close()
    assert run_json(capsys, "clean")[1]["removed"] == [paths[0].name]


def test_another_folder(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    path = put(other, 7)
    assert [pack["name"] for pack in run_json(capsys, "list", "--dir", str(other))[1]["packs"]] == [path.name]
    assert run_json(capsys, "list")[1]["packs"] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: action"),
        (["fly"], "invalid choice: 'fly'"),
        (["list", "zz"], "no pack in {folder} begins with 'zz'; see `caravan cache list`"),
        (["clean", "--dir", "/nowhere"], "dir: /nowhere is no folder"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    code, out, error = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert says.format(folder=folder) in error
    assert error.count("\n") == 1


def test_a_folder_that_is_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("?")
    code, _, error = run(capsys, "list")
    assert (code, error) == (1, f"caravan: {folder}: Not a directory\n")


def test_it_imports_neither_ray_nor_torch() -> None:
    code = "import sys, cluster.cache\nassert not {'ray', 'torch', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
