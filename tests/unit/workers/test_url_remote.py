"""Models behind URLs: stores that are read in ranges, web servers good and bad, lists of checksums, what is refused."""

import contextlib
import hashlib
import os
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.hub import SERVED, made_up_model
from workers.errors import UserError
from workers.model_download import FetchProgress
from workers.model_fetch import fetch, fetched
from workers.model_source import ModelSource
from workers.remote import FetchError

BIG = 3_000_000


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.file_download.BACKOFF_S", 0.01)
    monkeypatch.setattr("workers.model_download.TICK_S", 0.02)
    monkeypatch.setattr("workers.url_remote.RANGE_BYTES", 2**20)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return made_up_model(tmp_path / "store" / "model", BIG)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SERVED}


class WebServer(SimpleHTTPRequestHandler):
    """A folder's files; with ranges, without, with a page of links or without."""

    takes_ranges = True
    lists = True
    cuts: list[int]
    served: Counter[str]
    has_etag = False
    failing: list[str]
    """Files of which the next HEAD, and the GET that fsspec tries instead, are refused."""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        if (name := self.path.rpartition("/")[2]) in self.failing:
            self.failing.remove(name)
            self.send_error(503)
        else:
            super().do_HEAD()

    def list_directory(self, path: Any) -> Any:
        if not self.lists:
            self.send_error(403)
            return None
        return super().list_directory(path)

    def end_headers(self) -> None:
        if self.has_etag and Path(self.translate_path(self.path)).is_file():
            self.send_header("ETag", f'"{hashlib.md5(Path(self.translate_path(self.path)).read_bytes()).hexdigest()}"')
        super().end_headers()

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return super().do_GET()
        if path.name in self.failing:
            self.failing.remove(path.name)
            return self.send_error(503)
        whole = path.read_bytes()
        start = 0
        if self.takes_ranges and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(whole) - start))
        self.end_headers()
        piece = whole[start:]
        is_cut = path.name == "model.safetensors" and bool(self.cuts)
        if is_cut:
            piece = piece[: self.cuts.pop(0)]
        self.served[path.name] += len(piece)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(piece)
            if is_cut:
                time.sleep(0.3)  # So that it has come before the end has.
        return None


@contextlib.contextmanager
def web(folder: Path, **how: Any) -> Iterator[tuple[str, type[WebServer]]]:
    handler = type("Handler", (WebServer,), {"cuts": [], "served": Counter(), "failing": [], **how})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/model", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# ---- stores -------------------------------------------------------------------------------------------------------


def test_a_folder_by_url_is_copied(model: Path, cache: Path) -> None:
    source = ModelSource.parse(f"file://{model}")
    folder = fetch(source, cache)
    assert folder != model
    assert content(folder) == content(model)
    assert not (folder / "README.md").exists()
    assert fetch(source, cache) == fetched(source, cache) == folder


def test_another_content_is_another_version(model: Path, cache: Path) -> None:
    source = ModelSource.parse(f"file://{model}")
    first = fetch(source, cache)
    made_up_model(model, BIG, seed=5)
    second = fetch(source, cache)
    assert first != second
    assert content(second) == content(model) != content(first)


def test_an_object_store(model: Path, cache: Path) -> None:
    """Memory stands for one: read by ranges through the same calls."""
    place = f"/{uuid.uuid4().hex}/model"
    memory = fsspec.filesystem("memory")
    memory.put(str(model), place, recursive=True)
    folder = fetch(ModelSource.parse(f"memory:/{place}"), cache)
    assert content(folder) == content(model)


def test_a_store_that_fails_now_and_then(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"/{uuid.uuid4().hex}/model"
    memory = fsspec.filesystem("memory")
    memory.put(str(model), place, recursive=True)
    real = type(memory).cat_file
    failures: list[Exception] = [OSError("reset"), TimeoutError()]
    reads = []

    def cat_file(self: Any, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        if path.endswith("model.safetensors"):
            if failures:
                raise failures.pop(0)
            reads.append((end or 0) - (start or 0))
        return bytes(real(self, path, start, end, **options))

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    source = ModelSource.parse(f"memory:/{place}")
    assert content(fetch(source, cache)) == content(model)
    assert sum(reads) == (model / "model.safetensors").stat().st_size
    failures.append(PermissionError("denied"))
    with pytest.raises(UserError, match=r"may not be read with these credentials \(PermissionError: denied\)"):
        fetch(source, cache.with_name("other"))


def test_a_call_that_does_not_end(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.url_remote.CALL_BOUND_S", 0.2)
    monkeypatch.setattr("workers.file_download.TRIES", 2)
    hang = threading.Event()
    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.cat_file", lambda *_, **__: hang.wait(20))
    with pytest.raises(FetchError, match=r"no answer within 0\.2 s; that was try 2 of 2"):
        fetch(ModelSource.parse(f"file://{model}"), cache)
    hang.set()


# ---- web servers --------------------------------------------------------------------------------------------------


def test_a_web_server_with_a_page_of_links(model: Path, cache: Path) -> None:
    with web(model.parent) as (url, handler):
        handler.cuts += [1_000_000, 500_000]
        folder = fetch(ModelSource.parse(url), cache)
        assert content(folder) == content(model)
        size = (model / "model.safetensors").stat().st_size
        assert size <= handler.served["model.safetensors"] < size + 2**18
        assert not handler.served["README.md"]


def test_a_web_server_without_ranges(model: Path, cache: Path) -> None:
    with web(model.parent, takes_ranges=False) as (url, handler):
        handler.cuts += [1_000_000]
        assert content(fetch(ModelSource.parse(url), cache)) == content(model)


def test_a_web_server_without_listing(tmp_path: Path, cache: Path) -> None:
    model = made_up_model(tmp_path / "store" / "model", 20_000, shards=3)
    with web(model.parent, lists=False) as (url, _):
        folder = fetch(ModelSource.parse(url), cache)
    assert len(list(folder.glob("*.safetensors"))) == 3
    assert (folder / "chat_template.jinja").exists()


@pytest.mark.parametrize("lists", [True, False])
def test_a_file_that_cannot_be_asked_for_just_now_is_not_left_out(model: Path, cache: Path, lists: bool) -> None:
    with web(model.parent, lists=lists) as (url, handler):
        handler.failing += ["chat_template.jinja"] * 2
        assert content(fetch(ModelSource.parse(url), cache)) == content(model)
        assert handler.failing == []


def test_changed_on_the_way(model: Path, cache: Path) -> None:
    with web(model.parent, has_etag=True) as (url, _):
        changed = threading.Event()

        def report(progress: FetchProgress) -> None:
            if progress.file == "model.safetensors" and not changed.is_set():
                changed.set()
                made_up_model(model, BIG, seed=9)

        with pytest.raises(FetchError, match="was changed while it was fetched; start again"):
            fetch(ModelSource.parse(url), cache, report)
        assert content(fetch(ModelSource.parse(url), cache)) == content(model)


# ---- checksums ----------------------------------------------------------------------------------------------------


def sums(folder: Path) -> str:
    return "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in SERVED)


def test_a_list_of_checksums(model: Path, cache: Path) -> None:
    (model / "SHA256SUMS").write_text(sums(model))
    assert content(fetch(ModelSource.parse(f"file://{model}"), cache)) == content(model)
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(BIG // 2)
        file.write(b"!")
    with pytest.raises(FetchError, match=r"model\.safetensors has come damaged twice: its sha256 is"):
        fetch(ModelSource.parse(f"file://{model}"), cache)


def test_a_fetched_folder_may_be_handed_on(model: Path, cache: Path, tmp_path: Path) -> None:
    folder = fetch(ModelSource.parse(f"file://{model}"), cache)
    again = fetch(ModelSource.parse(f"file://{folder}"), tmp_path / "second")
    assert content(again) == content(model)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(BIG // 2)
        file.write(b"!")
    with pytest.raises(FetchError, match="damaged twice"):
        fetch(ModelSource.parse(f"file://{folder}"), tmp_path / "third")


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file:///no/such/folder", "there is no /no/such/folder"),
        ("s4://bucket/x", "s4:// is no kind of URL that fsspec knows"),
    ],
)
def test_no_such_place(cache: Path, url: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        fetch(ModelSource.parse(url), cache)
    assert says in str(caught.value)


def test_a_server_that_is_not_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.file_download.TRIES", 2)
    with pytest.raises(FetchError, match=r"^http://127.0.0.1:9/x: ClientConnectorError: .*; that was try 2 of 2$"):
        fetch(ModelSource.parse("http://127.0.0.1:9/x"), cache)


@pytest.mark.parametrize(
    ("url", "library", "says"),
    [
        ("s3://bucket/x", "s3fs", "s3:// needs s3fs, which is not installed: pip install 'caravan[s3]'"),
        ("gs://bucket/x", "gcsfs", "gs:// needs gcsfs, which is not installed: pip install 'caravan[gcs]'"),
    ],
)
def test_a_library_that_is_not_there(
    cache: Path, monkeypatch: pytest.MonkeyPatch, url: str, library: str, says: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError) as caught:
        fetch(ModelSource.parse(url), cache)
    assert str(caught.value) == f"{url}: {says}"
    assert not os.path.exists(cache)


def test_an_empty_folder(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no files of a model are there; give the folder that holds config\.json"):
        fetch(ModelSource.parse(f"file://{tmp_path}/empty"), cache)
