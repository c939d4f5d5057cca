"""Fetching from the hub: what comes, how often, through which misfortunes, and what is said when it cannot."""

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import SERVED, Hub, in_process, made_up_model
from workers.errors import UserError
from workers.model_cache import FetchState, ModelCache, hold
from workers.model_download import FetchProgress, FetchStoppedError
from workers.model_fetch import fetch, fetched, pinned
from workers.model_manifest import JOURNAL, MANIFEST, read_manifest
from workers.model_source import ModelSource
from workers.remote import FetchError

NAME = "org/model"
SOURCE = ModelSource.parse(f"hf://{NAME}")
BIG = 3_000_000


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with in_process(monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return made_up_model(tmp_path / "model", BIG)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SERVED}


def notes(seen: list[FetchProgress]) -> str:
    return "\n".join(dict.fromkeys(progress.note for progress in seen if progress.note))


# ---- what comes ---------------------------------------------------------------------------------------------------


def test_what_serving_needs_and_nothing_else(hub: Hub, model: Path, cache: Path) -> None:
    commit = hub.add(NAME, model)
    seen: list[FetchProgress] = []
    folder = fetch(SOURCE, cache, seen.append)
    assert content(folder) == content(model)
    assert sorted(os.listdir(folder)) == sorted([*SERVED, MANIFEST, ".lock"])
    assert {name: hub.served[name] for name in hub.served} == {
        name: (model / name).stat().st_size for name in SERVED
    }, "each byte once, none of any other file"
    total = sum((model / name).stat().st_size for name in SERVED)
    assert (seen[-1].bytes_done, seen[-1].bytes_total) == (total, total)
    manifest = read_manifest(folder)
    assert manifest is not None
    assert (manifest.source, manifest.version, manifest.total) == (f"hf://{NAME}", commit, total)
    assert fetched(SOURCE, cache) == folder
    assert str(pinned(SOURCE, folder)) == f"hf://{NAME}@{commit}"


def test_the_index_says_which_weights(hub: Hub, tmp_path: Path, cache: Path) -> None:
    model = made_up_model(tmp_path / "sharded", 50_000, shards=6)
    (model / "consolidated.safetensors").write_bytes(bytes(9000))
    hub.add(NAME, model)
    folder = fetch(SOURCE, cache)
    assert len(list(folder.glob("model-*.safetensors"))) == 6
    assert hub.served["consolidated.safetensors"] == 0


def test_it_says_who_asks_and_nothing_of_its_surroundings(hub: Hub, model: Path, cache: Path) -> None:
    hub.add(NAME, model)
    fetch(SOURCE, cache)
    assert not [path for path in hub.requests if "harness" in path or "telemetry" in path]
    agents = {headers["user-agent"] for headers in hub.headers}
    assert all(agent.startswith("caravan/") and "torch" not in agent and "agent/" not in agent for agent in agents)


def test_a_fetched_model_costs_one_small_request_and_a_commit_none(hub: Hub, model: Path, cache: Path) -> None:
    hub.add(NAME, model)
    folder = fetch(SOURCE, cache)
    hub.requests.clear()
    assert fetch(SOURCE, cache) == folder
    assert hub.requests == [f"/api/models/{NAME}/revision/main"]
    hub.requests.clear()
    assert fetch(pinned(SOURCE, folder), cache) == folder
    assert hub.requests == []


def test_revisions(hub: Hub, tmp_path: Path, cache: Path) -> None:
    old = hub.add(NAME, made_up_model(tmp_path / "old", seed=1), refs=("main", "v1"))
    first = fetch(SOURCE, cache)
    hub.add(NAME, made_up_model(tmp_path / "new", seed=2), refs=("main", "refs/pr/3"))
    second = fetch(SOURCE, cache)
    assert content(first) == content(tmp_path / "old")
    assert content(second) == content(tmp_path / "new")
    served = hub.served.copy()
    assert fetch(SOURCE.at("v1"), cache) == first
    assert fetch(SOURCE.at("refs/pr/3"), cache) == second
    assert fetch(SOURCE.at(old), cache) == first
    assert hub.served == served, "the same commit under another name is not fetched again"
    assert fetched(SOURCE, cache) == second
    assert fetched(SOURCE.at("v1"), cache) == first
    assert fetched(SOURCE.at("v2"), cache) is None


def test_a_branch_that_was_put_back(hub: Hub, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = hub.add(NAME, made_up_model(tmp_path / "old", seed=1))
    first = fetch(SOURCE, cache)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 10)
    hub.add(NAME, made_up_model(tmp_path / "new", seed=2))
    fetch(SOURCE, cache)
    monkeypatch.setattr(time, "time", lambda: now + 20)
    hub.repositories[NAME].refs["main"] = old
    assert fetch(SOURCE, cache) == first
    assert fetched(SOURCE, cache) == first, "what the branch last meant"


# ---- misfortunes --------------------------------------------------------------------------------------------------


def test_a_connection_that_breaks_goes_on_where_it_was(
    hub: Hub, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.file_download.BACKOFF_S", 0.3)  # Long enough to be told of.
    hub.add(NAME, model)
    hub.cuts["model.safetensors"] = [2**20, 0, 2**20 + 17]
    seen: list[FetchProgress] = []
    folder = fetch(SOURCE, cache, seen.append)
    assert content(folder) == content(model)
    size = (model / "model.safetensors").stat().st_size
    assert size <= hub.served["model.safetensors"] < size + 2 * 2**17, "but for what was on its way"
    assert "model.safetensors: http" in notes(seen)
    assert "trying again" in notes(seen)


def test_what_is_there_is_not_fetched_again(
    hub: Hub, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.file_download.TRIES", 2)
    hub.add(NAME, model)
    hub.cuts["model.safetensors"] = [2**20, 0, 0]
    with pytest.raises(FetchError, match=r"model\.safetensors: .*that was try 2 of 2"):
        fetch(SOURCE, cache)
    (folder,) = cache.iterdir()
    assert read_manifest(folder) is None
    assert fetched(SOURCE, cache) is None, "half a model is none"
    served = hub.served["model.safetensors"]
    hub.served.clear()
    seen: list[FetchProgress] = []
    assert fetch(SOURCE, cache, seen.append) == folder
    assert content(folder) == content(model)
    assert set(hub.served) == {"model.safetensors"}
    size = (model / "model.safetensors").stat().st_size
    assert size <= hub.served["model.safetensors"] + served < size + 2**17
    assert seen[-1].bytes_done == seen[-1].bytes_total
    assert not (folder / JOURNAL).exists()


def test_a_server_that_knows_no_ranges(hub: Hub, model: Path, cache: Path) -> None:
    hub.add(NAME, model)
    hub.ignores_ranges = True
    hub.cuts["model.safetensors"] = [2**20]
    assert content(fetch(SOURCE, cache)) == content(model)


def test_requests_of_bounded_length(hub: Hub, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.hub_remote.REQUEST_BYTES", 1_000_000)
    hub.add(NAME, model)
    folder = fetch(SOURCE, cache)
    assert content(folder) == content(model)
    assert hub.served["model.safetensors"] == (model / "model.safetensors").stat().st_size
    assert len([path for path in hub.requests if path.startswith("/cdn") and "model.safe" in path]) == 4


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_wrong_checksum_is_fetched_again_and_then_refused(hub: Hub, model: Path, cache: Path, name: str) -> None:
    hub.add(NAME, model)
    hub.damaged.add(name)
    seen: list[FetchProgress] = []
    with pytest.raises(FetchError, match=f"{name} has come damaged twice: its (sha256|git-sha1) is"):
        fetch(SOURCE, cache, seen.append)
    assert hub.served[name] == 2 * (model / name).stat().st_size
    assert fetched(SOURCE, cache) is None
    hub.damaged.clear()
    assert content(fetch(SOURCE, cache)) == content(model)


def test_a_leftover_that_is_wrong_is_fetched_anew(hub: Hub, model: Path, cache: Path, monkeypatch) -> None:
    monkeypatch.setattr("workers.file_download.TRIES", 1)
    hub.add(NAME, model)
    hub.cuts["model.safetensors"] = [2**20]
    with pytest.raises(FetchError):
        fetch(SOURCE, cache)
    (partial,) = cache.glob("*/model.safetensors.partial")
    with partial.open("r+b") as file:
        file.write(b"\xff" * 100)
    assert content(fetch(SOURCE, cache)) == content(model)


def test_a_copy_that_lost_some_is_mended(hub: Hub, model: Path, cache: Path) -> None:
    hub.add(NAME, model)
    folder = fetch(SOURCE, cache)
    os.truncate(folder / "model.safetensors", 2_000_000)
    (folder / "tokenizer.json").unlink()
    assert fetched(SOURCE, cache) is None
    hub.served.clear()
    assert fetch(SOURCE, cache) == folder
    assert content(folder) == content(model)
    assert hub.served["model.safetensors"] == (model / "model.safetensors").stat().st_size - 2_000_000
    assert hub.served["config.json"] == 0


def test_a_copy_in_use_that_lost_some_is_refused(hub: Hub, model: Path, cache: Path) -> None:
    hub.add(NAME, model)
    folder = fetch(SOURCE, cache)
    lock = hold(folder)
    assert lock is not None
    os.truncate(folder / "model.safetensors", 100)
    with pytest.raises(FetchError, match="a process serves from it"):
        fetch(SOURCE, cache)
    lock.close()
    assert content(fetch(SOURCE, cache)) == content(model)


def test_a_kill_between_renaming_and_journal(hub: Hub, model: Path, cache: Path) -> None:
    hub.add(NAME, model)
    folder = fetch(SOURCE, cache)
    (folder / MANIFEST).unlink()
    hub.served.clear()
    assert fetch(SOURCE, cache) == folder
    assert not hub.served, "all there: read, checked, and kept"


def test_another_process_that_hangs(hub: Hub, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, model)
    folder = fetch(SOURCE, cache)
    (folder / MANIFEST).rename(folder / JOURNAL)
    other = ModelCache(cache).claim(folder)
    assert other is not None
    other.write(FetchState(1000, 3000, 7, "model.safetensors", "trouble"))
    monkeypatch.setattr("workers.model_fetch.STALL_S", 0.3)
    seen: list[FetchProgress] = []
    with pytest.raises(FetchError, match=r"another process has been fetching it and gave no sign of life for 0\.3 s"):
        fetch(SOURCE, cache, seen.append)
    assert seen[-1] == FetchProgress(1000, 3000, "model.safetensors", "trouble")
    stop = threading.Event()
    stop.set()
    with pytest.raises(FetchStoppedError):
        fetch(SOURCE, cache, stop=stop)
    other.close()
    assert fetch(SOURCE, cache) == folder


def test_stop_leaves_what_is_there(hub: Hub, model: Path, cache: Path) -> None:
    hub.add(NAME, model)
    hub.cuts["model.safetensors"] = [2**20]
    hub.pause_s = 0.01
    stop = threading.Event()

    def report(progress: FetchProgress) -> None:
        if progress.file == "model.safetensors" and progress.bytes_done > 500_000:
            stop.set()

    with pytest.raises(FetchStoppedError):
        fetch(SOURCE, cache, report, stop)
    (partial,) = cache.glob("*/model.safetensors.partial")
    size = partial.stat().st_size
    assert size > 400_000
    time.sleep(0.2)
    assert partial.stat().st_size == size, "nobody writes any more"
    hub.pause_s = 0
    assert content(fetch(SOURCE, cache)) == content(model)


def test_what_report_raises_ends_it(hub: Hub, model: Path, cache: Path) -> None:
    hub.add(NAME, model)

    def report(progress: FetchProgress) -> None:
        if progress.bytes_total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(SOURCE, cache, report)
    assert content(fetch(SOURCE, cache)) == content(model)


# ---- refusals -----------------------------------------------------------------------------------------------------


def refused(cache: Path, source: ModelSource = SOURCE, **options) -> str:
    with pytest.raises(UserError) as caught:
        fetch(source, cache, **options)
    assert not cache.exists() or not list(cache.iterdir()), "nothing stays of what cannot be served"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_such_repository(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says = refused(cache)
    assert says.startswith(
        f"hf://{NAME}: {hub.address} has no such model (status 401), or it is private: then set HF_TOK"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    says = refused(cache)
    assert "the account whose token is in use may not see it" in says
    assert "hf_mine" not in says


def test_no_such_revision(hub: Hub, model: Path, cache: Path) -> None:
    hub.add(NAME, model)
    assert "the repository has no revision 'v9'" in refused(cache, SOURCE.at("v9"))


def test_a_private_one_takes_the_token(hub: Hub, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, model, token="hf_right")
    assert "set HF_TOKEN, or run `hf auth login`" in refused(cache)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    hub.headers.clear()
    assert content(fetch(SOURCE, cache)) == content(model)
    sent = [
        ("authorization" in headers, path)
        for headers, path in zip(hub.headers, hub.requests[-len(hub.headers) :], strict=True)
    ]
    assert not [path for with_token, path in sent if with_token and path.startswith("/cdn/") and "model" in path], (
        "the delivery network is another host: no token for it"
    )


def test_a_gated_one(hub: Hub, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, model, token="hf_right", is_gated=True)
    assert refused(cache) == (
        f"hf://{NAME} is gated: ask for access at {hub.address}/{NAME}, and set HF_TOKEN, or run `hf auth login`"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert refused(cache).endswith("with the account whose token is in use")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert content(fetch(SOURCE, cache)) == content(model)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer.json"),
        ("model.safetensors", "holds no *.safetensors"),
    ],
)
def test_no_checkpoint(hub: Hub, model: Path, cache: Path, file: str, says: str) -> None:
    (model / file).unlink()
    hub.add(NAME, model)
    assert says in refused(cache)


def test_another_kind_of_model_is_refused_before_its_weights(hub: Hub, model: Path, cache: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    hub.add(NAME, model)
    assert "model_type is 'llama'; Caravan serves llama4" in refused(cache)
    assert hub.served["model.safetensors"] == 0


def test_an_index_that_names_what_is_not_there(hub: Hub, tmp_path: Path, cache: Path) -> None:
    model = made_up_model(tmp_path / "sharded", 5000, shards=2)
    (model / "model-00002-of-00002.safetensors").unlink()
    hub.add(NAME, model)
    assert "names model-00002-of-00002.safetensors, which is not there" in refused(cache)


def test_too_many_requests_are_waited_for(hub: Hub, model: Path, cache: Path) -> None:
    hub.add(NAME, model)
    hub.refusals = {"api": [(429, {"Retry-After": "0"}), (503, {})], "model.safetensors": [(429, {}), (500, {})]}
    seen: list[FetchProgress] = []
    assert content(fetch(SOURCE, cache, seen.append)) == content(model)
    assert "status 429" in notes(seen)


def test_too_many_requests_for_too_long(hub: Hub, model: Path, cache: Path) -> None:
    hub.add(NAME, model)
    hub.refusals = {"api": [(429, {"RateLimit": '"api";r=0;t=1800'})]}
    with pytest.raises(FetchError, match=r"wants fewer requests .*; it asks to come back in 1800 s"):
        fetch(SOURCE, cache)


def test_an_endpoint_that_is_no_hub(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[NAME] = None  # type: ignore[assignment]
    hub.refusals = {"api": [(200, {})]}
    with pytest.raises(FetchError, match=r"does not answer as a hub does|names no commit"):
        fetch(SOURCE, cache)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("workers.file_download.TRIES", 2)
    with pytest.raises(FetchError, match=r"127.0.0.1:9: ConnectError.*try 2 of 2"):
        fetch(SOURCE, cache)


# ---- offline ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every address that anybody tries to reach."""
    tried: list[object] = []

    def refuse(_: socket.socket, address: object) -> None:
        tried.append(address)
        raise OSError(errno.ENETUNREACH, "tests are offline")

    def refuse_name(host: object, *_: object, **__: object) -> list[object]:
        tried.append(host)
        raise socket.gaierror("tests are offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse_name)
    return tried


@pytest.mark.parametrize("how", ["flag", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_nothing_is_requested(
    hub: Hub, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, how: str, request: pytest.FixtureRequest
) -> None:
    commit = hub.add(NAME, model)
    folder = fetch(SOURCE, cache)
    tried = request.getfixturevalue("no_sockets")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    if how != "flag":
        monkeypatch.setenv(how, "1")
    hub.requests.clear()
    offline = how == "flag"
    assert fetch(SOURCE, cache, offline=offline) == folder
    assert fetch(SOURCE.at(commit), cache, offline=offline) == folder
    other = ModelSource.parse("hf://org/other")
    with pytest.raises(
        UserError, match=r"hf://org/other is not in this host's cache, and offline mode is on"
    ) as caught:
        fetch(other, cache, offline=offline)
    assert "caravan fetch hf://org/other" in str(caught.value)
    if offline:
        with pytest.raises(UserError, match="is not in this host's cache"):
            fetch(ModelSource.parse("s3://bucket/x"), cache, offline=True)
    assert tried == hub.requests == []


def test_a_local_folder_needs_neither_network_nor_cache(model: Path, cache: Path, no_sockets: list[object]) -> None:
    source = ModelSource.of(model)
    assert fetch(source, cache) == fetched(source, cache) == model
    assert pinned(source, model) == source
    assert not cache.exists()
    assert hold(model) is None
    assert no_sockets == []
    with pytest.raises(UserError, match="no such folder; give the folder of a Hugging Face checkpoint; for the Hugg"):
        fetch(ModelSource.parse("org/model"), cache)


def test_a_hub_that_does_not_answer_while_there_is_a_copy(hub: Hub, model: Path, cache: Path) -> None:
    hub.add(NAME, model)
    folder = fetch(SOURCE, cache)
    hub.refusals = {"api": [(503, {})]}
    seen: list[FetchProgress] = []
    assert fetch(SOURCE, cache, seen.append) == folder
    assert "status 503; the copy fetched on" in notes(seen)


# ---- room ---------------------------------------------------------------------------------------------------------


def test_no_room(hub: Hub, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, model)
    monkeypatch.setattr("workers.model_cache.free_bytes", lambda folder: 65 * 2**20)
    with pytest.raises(FetchError) as caught:
        fetch(SOURCE, cache)
    says = str(caught.value)
    assert f"no room for hf://{NAME} in {cache} on {socket.gethostname()}: it needs 3.0 MB more" in says
    assert "and 1.0 MB of the disk are free" in says
    assert hub.served["model.safetensors"] == 0, "said before, not after"


def test_a_bound(hub: Hub, model: Path, cache: Path) -> None:
    hub.add(NAME, model)
    with pytest.raises(FetchError, match=r"has 3\.0 MB, and .* may hold 1\.0 MB; raise models_cache_bytes"):
        fetch(SOURCE, cache, limit_bytes=1_000_000)


def test_room_is_made_of_what_nobody_uses(hub: Hub, tmp_path: Path, cache: Path) -> None:
    folders = []
    for number in range(3):
        hub.add(f"org/m{number}", made_up_model(tmp_path / f"m{number}", 1_000_000, seed=number))
        folders.append(fetch(ModelSource.parse(f"hf://org/m{number}"), cache))
        os.utime(folders[-1] / ".lock", (1000 + number, 1000 + number))
    used = hold(folders[0])
    assert used is not None
    os.utime(folders[0] / ".lock", (1000, 1000))
    hub.add(NAME, made_up_model(tmp_path / "more", 1_000_000))
    seen: list[FetchProgress] = []
    fetch(SOURCE, cache, seen.append, limit_bytes=3_500_000)
    assert [folder.exists() for folder in folders] == [True, False, True], "the oldest is served, the next one went"
    assert f"removed {folders[1].name}" in notes(seen)
    with pytest.raises(FetchError, match=r"may hold|no room"):
        fetch(ModelSource.parse("hf://org/m1"), cache, limit_bytes=1_100_000)
    used.close()


def test_a_disk_that_fills_up(hub: Hub, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, model)
    written = os.pwrite

    def full(fd: int, data: object, offset: int) -> int:
        if offset > 10**6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(fd, data, offset)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(FetchError, match=rf"no room for hf://{NAME}: the disk of .* is full, and what has been"):
            fetch(SOURCE, cache)
    assert content(fetch(SOURCE, cache)) == content(model)


def test_a_cache_that_cannot_be_written(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.add(NAME, model)
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match=r"cannot be kept in .*file"):
        fetch(SOURCE, tmp_path / "file")


def test_removed_while_somebody_wants_it(hub: Hub, model: Path, cache: Path) -> None:
    hub.add(NAME, model)
    folder = fetch(SOURCE, cache)
    assert ModelCache(cache).remove(folder)
    assert not folder.exists()
    with pytest.raises(FetchError, match="has been removed; start again"):
        hold(folder)
    assert content(fetch(SOURCE, cache)) == content(model)
