"""deploy/network.md names every port there is, with its default, and none that is not."""

import dataclasses
import re
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ServeTable, load_config
from cluster.network import NetworkConfig

PAGE = Path(__file__).resolve().parents[3] / "deploy" / "network.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def start() -> Any:
    """The command `ray start`."""
    with warnings.catch_warnings():
        # Of Ray's own use of pydantic.
        warnings.simplefilter("ignore")
        from ray.scripts.scripts import start

        return start


def rows(first: str) -> dict[str, str]:
    """First cell, without its backticks, to the second, of the table whose first column has this name."""
    table = TEXT[TEXT.index(f"| {first} | Default |") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert all(re.fullmatch("`[^`]+`", row[0]) for row in cells)
    assert all(all(row) for row in cells), "no cell is empty"
    return {row[0].strip("`"): row[1] for row in cells}


def defaults(table: str, kind: type) -> dict[str, str]:
    fields = dataclasses.fields(kind)
    return {
        f"[{table}] {field.name}": str(field.default or "any")
        for field in fields
        if field.name.endswith(("_port", "_ports"))
    }


def test_every_port_of_caravan_stands_there_with_its_default() -> None:
    assert rows("Key") == defaults("serve", ServeTable) | defaults("network", NetworkConfig)
    others = {field.name for field in dataclasses.fields(NetworkConfig)} - {name.split()[1] for name in rows("Key")}
    assert others == {"interface"}
    assert "[network] interface" in TEXT


def test_every_port_of_ray_stands_there_with_its_default(start: Any) -> None:
    told = rows("Option")
    options: dict[str, Any] = {
        option.opts[0]: option.default for option in start.params if "port" in option.name and not option.hidden
    }
    # Another way to say the same as two others.
    del options["--worker-port-list"]
    assert set(told) == set(options)
    for name, default in options.items():
        if isinstance(default, int) and default:
            assert told[name] == str(default)
    helps = {option.opts[0]: option.help for option in start.params}
    assert told["--port"] in helps["--port"]
    assert told["--ray-client-server-port"] in helps["--ray-client-server-port"]
    unset = {name for name, value in told.items() if value == "any"}
    assert unset == {name for name, value in options.items() if not isinstance(value, int) or value == 0} - {
        "--port",
        "--ray-client-server-port",
    }


def test_the_examples_are_accepted(tmp_path: Path, start: Any) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    file = tmp_path / "caravan.toml"
    file.write_text(example)
    config = load_config({"ray_address": "auto", "ranks": 32}, file, Path("/models/x"))
    config.network.check_room(8)
    tables = tomllib.loads(example)
    assert set(tables["network"]) == {field.name for field in dataclasses.fields(NetworkConfig)}, "every key"
    known = {opt for option in start.params for opt in option.opts}
    for options in re.findall(r"^ray start.*?(?=\n[^ ])", TEXT, re.DOTALL | re.MULTILINE):
        assert set(re.findall(r"--[a-z-]+", options)) <= known


@pytest.mark.parametrize("name", ["README.md", "network.md"])
def test_links_lead_somewhere(name: str) -> None:
    page = PAGE.with_name(name)
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists()
