"""What a first and a second start leave in the cache, and what a Ray of our own is made of."""

import json
import time
from pathlib import Path

import pytest

from tests.e2e.serving import Server, caravan


def cache(home: Path, *arguments: str) -> dict:
    done = caravan("cache", *arguments, "--json", env={"XDG_CACHE_HOME": str(home)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_second_start_maps_what_the_first_one_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for start in ("first", "second"):
        server = Server(tmp_path / start, "--ranks", "2")
        try:
            server.wait_ready()
            assert ("packing 35.8 MB of weights" in server.stderr) == (start == "first")
            (pack,) = cache(tmp_path, "list")["packs"]
            assert (pack["state"], pack["dtype"], Path(pack["checkpoint"]).name) == ("in use", "bfloat16", "nano")
            assert cache(tmp_path, "clean")["in_use"] == [pack["name"]]
            assert server.generate("The whale", "--max-tokens", "8", "--temperature", "0")["usage"]
            programs = {Path(process.name()).name for process in server.left}
            assert not {name for name in programs if "agent" in name.lower() or "dashboard" in name.lower()}
            commands = [" ".join(process.cmdline()) for process in server.left]
            assert not [line for line in commands if "monitor.py" in line or "dashboard" in line.partition(" --")[0]]
            server.end()
            assert server.left == []
            assert server.process.returncode in (0, 143)
        finally:
            server.kill_all()
    assert cache(tmp_path, "verify")["packs"] == [{"name": pack["name"], "damage": ""}]
    # A process counts as gone with its first thread, its lock with the last.
    deadline = time.monotonic() + 20
    while not (removed := cache(tmp_path, "clean")["removed"]):
        assert time.monotonic() < deadline, "somebody still uses the pack"
    assert removed == [pack["name"]]


def test_without_a_cache_it_serves_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("no folder")
    config = tmp_path / "caravan.toml"
    config.write_text("[engine]\nweights_cache_dir = 'weights'\n")
    server = Server(tmp_path / "server", "--ranks", "2", "--config", str(config))
    try:
        server.wait_ready()
        assert f"caravan: {tmp_path / 'weights'}: cannot hold packed weights (" in server.stderr
        assert server.stderr.count("each rank keeps a copy of its weights instead of sharing them") == 1
        assert server.generate("The whale", "--max-tokens", "8")["usage"]
        server.end()
        assert server.left == []
    finally:
        server.kill_all()
