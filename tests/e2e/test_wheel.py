"""The built wheel works in an environment of its own, far from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("cluster", "dashboards", "protos", "router", "workers")
IMPORT_ALL = """
import importlib, json, pkgutil
files = {}
for floor in %r:
    package = importlib.import_module(floor)
    files[floor] = package.__file__
    for module in pkgutil.walk_packages(package.__path__, floor + "."):
        if not module.name.endswith("__main__"):
            files[module.name] = importlib.import_module(module.name).__file__
print(json.dumps(files))
"""


def run(*command: str | Path, cwd: Path = Path("/")) -> str:
    """Standard output of a command that must succeed; nothing of this session's Python environment reaches it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that neither leftovers of an older build get in nor new ones stay."""
    tree = tmp_path_factory.mktemp("source")
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, tree / floor, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=tree)
    (built,) = (tree / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; it borrows the dependencies of this one, not its editable install."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    run(sys.executable, "-m", "pip", "--python", folder, "install", "--no-deps", "--no-index", wheel)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched, but the .pth files in it, the editable install's too, are not read.
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_wheel_holds_all_source_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    kinds = (".py", ".pyi", ".proto", ".typed")
    expected = {str(p.relative_to(ROOT)) for floor in FLOORS for p in (ROOT / floor).rglob("*") if p.suffix in kinds}
    assert expected <= names
    assert {name.split("/")[0] for name in names} == {*FLOORS, "caravan-0.1.0.dist-info"}
    assert "caravan-0.1.0.dist-info/licenses/LICENSE" in names


def test_command_runs_outside_the_checkout(environment: Path) -> None:
    assert run(environment / "bin/caravan", "--version").split() == ["caravan", "0.1.0"]


def test_every_module_imports_from_the_wheel(environment: Path) -> None:
    output = run(environment / "bin/python", "-I", "-c", IMPORT_ALL % (FLOORS,))
    files = json.loads(output.splitlines()[-1])
    assert set(FLOORS) < set(files)
    outside = {name: file for name, file in files.items() if not Path(file).is_relative_to(environment)}
    assert not outside


def test_wheel_brings_the_contract(environment: Path) -> None:
    """What a client in another language needs: the .proto files, found beside the package."""
    find = (
        "import pathlib, protos; print(*sorted(p.name for p in pathlib.Path(protos.__file__).parent.glob('*.proto')))"
    )
    assert "inference.proto" in run(environment / "bin/python", "-I", "-c", find).split()
