"""A server whose model is on a hub: fetched once, then served without one."""

from pathlib import Path

import pytest

from tests.e2e.serving import Server, caravan
from tests.hub import Hub, environment, serving


@pytest.mark.hosts
def test_fetched_at_the_first_start_and_offline_at_the_second(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    texts = []
    with serving(Hub()) as hub:
        hub.add("org/nano", checkpoint)
        for start in ("first", "second"):
            for name, value in environment(hub).items():
                monkeypatch.setenv(name, value)
            monkeypatch.setenv("HF_HUB_OFFLINE", "1" if start == "second" else "0")
            server = Server(tmp_path / start, "--ranks", "2", "--model", "hf://org/nano")
            try:
                server.wait_ready()
                assert ("fetching hf://org/nano" in server.stderr) == (start == "first")
                texts.append(server.generate("The whale", "--max-tokens", "16", "--temperature", "0")["text"])
                assert server.status()["model"] == "nano"
                (model,) = Path(tmp_path / "caravan" / "models").iterdir()
                kept = caravan("cache", "clean", model.name, env={"XDG_CACHE_HOME": str(tmp_path)})
                assert "1 in use are kept" in kept.stdout
                server.end()
                assert server.left == []
            finally:
                server.kill_all()
            if start == "first":
                assert hub.served["model.safetensors"] == (checkpoint / "model.safetensors").stat().st_size
                hub.requests.clear()
        assert hub.requests == []
    assert texts[0] == texts[1] != ""


def test_a_model_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with serving(Hub()) as hub:
        for name, value in environment(hub).items():
            monkeypatch.setenv(name, value)
        done = caravan("serve", "--model", "hf://org/none", "--grpc-port", "19371", "--http-port", "19372")
    assert done.returncode == 2
    assert "hf://org/none: http://127.0.0.1" in done.stderr.splitlines()[-1]
    assert "has no such model" in done.stderr.splitlines()[-1]
