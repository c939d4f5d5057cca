"""The project's own rules: what lies where, what is pinned, who imports whom."""

import ast
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from protos import generate

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("cluster", "dashboards", "protos", "router", "workers")
TOP_LEVEL = {
    *(".ci", ".gitattributes", ".gitignore", ".pre-commit-config.yaml"),
    *("BENCHMARKS.md", "CHANGELOG.md", "CONTRIBUTING.md", "DESIGN.md", "LICENSE", "Makefile", "README.md"),
    *("constraints.txt", "pyproject.toml"),
    *("cluster", "dashboards", "deploy", "protos", "router", "tests", "workers"),
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources() -> list[Path]:
    """All Python files of the floors."""
    return [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def pins() -> dict[str, str]:
    """constraints.txt: canonical name to version."""
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    entries = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[^*+]+", str(entry.specifier)) for entry in entries), "every pin is NAME==VERSION"
    return {canonicalize_name(entry.name): str(entry.specifier)[2:] for entry in entries}


def declared(*extras: str) -> list[Requirement]:
    groups = [PROJECT["project"]["dependencies"]]
    groups += [PROJECT["project"]["optional-dependencies"][extra] for extra in extras]
    return [Requirement(line) for group in groups for line in group]


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports, wherever in the file; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph(root: Path, packages: tuple[str, ...]) -> dict[str, set[str]]:
    """Modules of the packages, each with those of them that it imports, inside functions too."""
    modules = {}
    for package in packages:
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {
        name: {other for other in imported_names(ast.parse(path.read_text())) if other in modules and other != name}
        for name, path in modules.items()
    }


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of the graph, its first node repeated at the end; empty when there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


# ---- what lies where --------------------------------------------------------------------------------------------


def test_top_level_is_exactly_the_house() -> None:
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if not line.startswith("#")]
    there = {entry.name for entry in ROOT.iterdir() if entry.name != ".git"}
    there = {name for name in there if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}
    assert there == TOP_LEVEL


def test_every_package_is_listed_and_typed() -> None:
    folders = {path.parent.relative_to(ROOT) for path in sources()}
    assert {".".join(folder.parts) for folder in folders} == set(PROJECT["tool"]["setuptools"]["packages"])
    assert all((ROOT / folder / "__init__.py").exists() for folder in folders)
    assert all((ROOT / floor / "py.typed").exists() for floor in FLOORS)


def test_licence_is_apache_in_full() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"


def test_changelog_knows_the_version() -> None:
    assert PROJECT["project"]["version"] in (ROOT / "CHANGELOG.md").read_text()


def test_hooks_run_the_steps_of_make_check() -> None:
    steps = re.search(r"^check: (.*?) ##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert steps
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"].split()[-1] for hook in hooks] == steps[1].split()


def test_ci_runs_check_and_test() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-3:] == ["make check", "make test", "make test-hosts"]


# ---- what is pinned ---------------------------------------------------------------------------------------------


def test_exact_versions() -> None:
    exact = {req.name: str(req.specifier) for req in declared("test") if req.name in ("torch", "ray", "transformers")}
    assert exact == {"torch": "==2.13.0", "ray": "==2.60.0", "transformers": "==5.23.0"}


def test_pins_satisfy_what_is_declared() -> None:
    have = pins()
    for req in declared("test"):
        assert req.specifier.contains(have[canonicalize_name(req.name)]), req


def test_every_dependency_of_a_dependency_is_pinned() -> None:
    have, unpinned, seen = pins(), set(), set()
    todo = [(req.name, extra) for req in declared("test") for extra in ("", *req.extras)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        if canonicalize_name(name) not in have:
            unpinned.add(name)
            continue
        for line in metadata.requires(name) or []:
            req = Requirement(line)
            if req.marker is None or req.marker.evaluate({"extra": extra}):
                todo += [(req.name, inner) for inner in ("", *req.extras)]
    assert not unpinned, "add them to constraints.txt"


def test_what_the_source_imports_is_declared() -> None:
    providers = metadata.packages_distributions()
    for path in sources():
        extras = ["bench"] if path.name.startswith("bench_") else []
        allowed = {canonicalize_name(req.name) for req in declared(*extras)}
        for name in {name.split(".")[0] for name in imported_names(ast.parse(path.read_text()))}:
            if name in sys.stdlib_module_names or name in FLOORS:
                continue
            dists = {canonicalize_name(dist) for dist in providers.get(name, [])}
            assert dists & allowed, (
                f"{path.relative_to(ROOT)} imports {name}, which no dependency in pyproject.toml brings"
            )


# ---- who imports whom -------------------------------------------------------------------------------------------


def test_no_import_circles() -> None:
    assert circle(import_graph(ROOT, FLOORS)) == []


@pytest.mark.parametrize(
    "late",
    ["import workers.a", "from workers import a", "def f():\n    from workers.a import x", "if 0:\n  import workers.a"],
)
def test_import_circles_are_found(tmp_path: Path, late: str) -> None:
    write_floors(
        tmp_path, {"workers/a.py": "import workers.b", "workers/b.py": "import workers.c", "workers/c.py": late}
    )
    assert circle(import_graph(tmp_path, FLOORS)) == ["workers.a", "workers.b", "workers.c", "workers.a"]


def write_floors(root: Path, files: dict[str, str]) -> None:
    for name in [*(f"{floor}/__init__.py" for floor in FLOORS), *files]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files.get(name, ""))


def lint_floors(root: Path, files: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """import-linter with this project's contracts over a small tree."""
    named = {
        name for contract in PROJECT["tool"]["importlinter"]["contracts"] for name in contract.get("source_modules", [])
    }
    write_floors(root, {f"{name.replace('.', '/')}.py": "" for name in named - set(FLOORS)} | files)
    shutil.copy(ROOT / "pyproject.toml", root)
    env = {**os.environ, "PYTHONPATH": str(root), "NO_COLOR": "1", "COLUMNS": "200"}
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_floors_allow_what_the_architecture_allows(tmp_path: Path) -> None:
    files = {
        "cluster/a.py": "import ray, dashboards, router.app, workers.rank_actor, workers.m, protos.p",
        "router/app.py": "import ray.serve, protos.p",
        "router/r.py": "import numpy, protos.p",
        "workers/rank_actor.py": "import ray, workers.m",
        "workers/m.py": "import torch, protos.p",
        "protos/p.py": "import grpc",
    }
    done = lint_floors(tmp_path, files)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "imports"),
    [
        ("router/a.py", "workers"),
        ("workers/a.py", "router"),
        ("protos/a.py", "workers"),
        ("router/a.py", "cluster"),
        ("router/a.py", "dashboards"),
        ("dashboards/a.py", "protos"),
        ("router/a.py", "torch"),
        ("cluster/a.py", "torch.distributed"),
        ("protos/a.py", "numpy"),
        ("protos/a.py", "ray"),
        ("workers/a.py", "ray"),
        ("router/a.py", "ray.serve"),
        ("workers/scheduler.py", "torch"),
        ("workers/a.py", "transformers"),
    ],
)
def test_floors_refuse(tmp_path: Path, module: str, imports: str) -> None:
    done = lint_floors(tmp_path, {module: f"def f():\n    import {imports}\n"})
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout


# ---- stubs ------------------------------------------------------------------------------------------------------


def test_stubs_are_those_of_the_protos() -> None:
    assert generate.stale(ROOT / "protos") == []


def test_a_stale_stub_is_named_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    protos = tmp_path / "protos"
    shutil.copytree(ROOT / "protos", protos, ignore=shutil.ignore_patterns("__pycache__"))
    stub = protos / "inference_pb2.pyi"
    stub.write_text(stub.read_text() + "\n")
    (protos / "gone_pb2.py").write_text("")

    assert generate.main(["--check"], protos) == 1
    error = capsys.readouterr().err
    assert "inference_pb2.pyi" in error
    assert "gone_pb2.py" in error
    assert "make stubs" in error

    assert generate.main([], protos) == 0
    assert not (protos / "gone_pb2.py").exists()
    assert generate.main(["--check"], protos) == 0


def test_a_broken_proto_gives_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    protos = tmp_path / "protos"
    protos.mkdir()
    (protos / "bad.proto").write_text('syntax = "proto3";\nmessage {')
    assert generate.main(["--check"], protos) == 1
    assert "bad.proto:2" in capsys.readouterr().err


# ---- make -------------------------------------------------------------------------------------------------------


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_make_alone_lists_every_target(tmp_path: Path) -> None:
    done = make(tmp_path)
    assert done.returncode == 0
    targets = set(re.findall(r"^  ([a-z-]+) ", done.stdout, re.MULTILINE))
    assert targets >= {"demo", "serve", "test", "check", "format", "stubs", "clean", "test-unit", "wheel", "help"}


@pytest.mark.parametrize("target", ["demo", "serve", "test", "check"])
def test_make_refuses_an_old_python(tmp_path: Path, target: str) -> None:
    old = tmp_path / "python3.10"
    pretend = (
        "import sys, platform; sys.version_info = (3, 10, 9); "
        "platform.python_version = lambda: '3.10.9'; exec(sys.argv[1])"
    )
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$2"\n')
    old.chmod(0o755)
    done = make(tmp_path, target, f"PYTHON={old}")
    assert done.returncode == 2
    assert f"Caravan needs Python 3.11 or newer, and '{old}' is 3.10.9" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_without_python_says_so(tmp_path: Path) -> None:
    done = make(tmp_path, "check", "PYTHON=no-such-python")
    assert done.returncode == 2
    assert "there is no 'no-such-python' here" in done.stderr
