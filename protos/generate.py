"""Writes the Python stubs of the .proto files beside this file, or checks that the committed ones are up to date.

    python protos/generate.py            writes them
    python protos/generate.py --check    writes nothing; exit 1 and a sentence when one differs

Needs grpcio-tools and mypy-protobuf, which the `test` extra brings.
"""

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


class GenerateError(RuntimeError):
    """protoc did not produce stubs; the message says why."""


def generate(protos: Path, out: Path) -> None:
    """Runs protoc over every .proto file.

    Args:
        protos: folder named "protos" with the .proto files, which import each other as "protos/NAME.proto".
        out: folder in which "protos/" with the stubs is written.

    Raises:
        GenerateError: protoc or one of its plugins is missing, or refuses a file.
    """
    root = protos.parent
    sources = sorted(str(path.relative_to(root)) for path in protos.glob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{root}"]
    for plugin in ("protoc-gen-mypy", "protoc-gen-mypy_grpc"):
        executable = Path(sysconfig.get_path("scripts")) / plugin
        if not executable.exists():
            raise GenerateError(
                f"{executable} does not exist; install mypy-protobuf into this environment (`make venv`)"
            )
        command.append(f"--plugin={plugin}={executable}")
    command += [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    done = subprocess.run(command + sources, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GenerateError(f"protoc failed: {done.stderr.strip()}")


def stubs(protos: Path) -> dict[str, bytes]:
    """Contents of the stubs in a folder, by file name."""
    return {path.name: path.read_bytes() for path in sorted(protos.iterdir()) if path.name.endswith(SUFFIXES)}


def stale(protos: Path) -> list[str]:
    """Names of stubs that are missing, differ from what their .proto file gives, or have none any more.

    Raises:
        GenerateError: as `generate`.
    """
    committed = stubs(protos)
    with tempfile.TemporaryDirectory() as out:
        generate(protos, Path(out))
        fresh = stubs(Path(out) / protos.name)
    return sorted(name for name in committed.keys() | fresh.keys() if committed.get(name) != fresh.get(name))


def main(arguments: list[str] | None = None, protos: Path = PROTOS) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the Python stubs of the .proto files.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a committed stub differs")
    check = parser.parse_args(arguments).check
    try:
        names = stale(protos)
        if not check:
            generate(protos, protos.parent)
            for name in stubs(protos):
                if not (protos / (name.split("_pb2")[0] + ".proto")).exists():
                    (protos / name).unlink()
    except GenerateError as error:
        print(f"protos/generate.py: {error}", file=sys.stderr)
        return 1
    listed = ", ".join(names)
    if check and names:
        print(f"protos/: these stubs are not those of the .proto files: {listed}; run `make stubs`", file=sys.stderr)
        return 1
    print(f"protos/: wrote {listed}" if names else "protos/: all stubs are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
