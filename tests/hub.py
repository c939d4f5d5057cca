"""A hub of one's own on this machine: as much of the Hugging Face hub's API as its client uses to list and fetch."""

import contextlib
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

LFS_BYTES = 4096
"""Files from here on are stored by their SHA-256 and come from a delivery network, as on the real one."""


def commit_of(number: int) -> str:
    return hashlib.sha1(str(number).encode()).hexdigest()


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]]
    """Content of every file at every commit."""
    refs: dict[str, str]
    token: str = ""
    """Who asks must send it; empty: anybody may."""
    is_gated: bool = False
    """The listing is everybody's, files are not."""


@dataclass
class Hub:
    """Faults are set while it runs; what it served is counted."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    address: str = ""
    requests: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)
    """Bytes of each file's content that were sent."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """Of a file the byte counts after which the next answers end, the connection cut."""
    refusals: dict[str, list[tuple[int, dict[str, str]]]] = field(default_factory=dict)
    """Of a file, or "api", the next answers' status and headers."""
    damaged: set[str] = field(default_factory=set)
    """Files whose first byte comes wrong."""
    ignores_ranges: bool = False
    pause_s: float = 0.0
    """After every 64 KiB."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    gate: threading.Event = field(default_factory=threading.Event)
    """Cleared, files wait before their content."""

    def add(self, name: str, folder: Path, refs: tuple[str, ...] = ("main",), **what: Any) -> str:
        """Another commit of a repository; returns it."""
        repository = self.repositories.setdefault(name, Repository({}, {}, **what))
        commit = commit_of(len(repository.commits))
        repository.commits[commit] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        repository.refs |= dict.fromkeys(refs, commit)
        return commit

    def size(self, name: str) -> int:
        """Bytes of a repository's newest commit."""
        return sum(len(content) for content in list(self.repositories[name].commits.values())[-1].values())


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub listens on a port of its own meanwhile."""
    hub.gate.set()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


def environment(hub: Hub) -> dict[str, str]:
    """Of a process that uses it."""
    return {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "NO_PROXY": "127.0.0.1",
    }


@contextlib.contextmanager
def in_process(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """A hub that this process asks, without anybody's token; waits between tries are short.

    Args:
        folder: for what the client keeps of its own.
    """
    with serving(Hub()) as hub:
        for name, value in environment(hub).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        # Read once, when it is imported.
        for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_DOWNLOAD_TIMEOUT", 5), ("HF_HUB_ETAG_TIMEOUT", 5)):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "no-token"))
        monkeypatch.setattr("workers.file_download.BACKOFF_S", 0.01)
        monkeypatch.setattr("workers.model_download.TICK_S", 0.02)
        yield hub
        huggingface_hub.close_session()


def made_up_model(folder: Path, nbytes: int = 300_000, shards: int = 1, seed: int = 0) -> Path:
    """A checkpoint that may be fetched, of weights that mean nothing; beside it files that serving does not need."""
    folder.mkdir(parents=True, exist_ok=True)
    random = Random(seed)
    names = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    )
    for number, name in enumerate(names):
        described = {f"t{number}": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}
        header = json.dumps(described).encode()
        (folder / name).write_bytes(len(header).to_bytes(8, "little") + header + random.randbytes(nbytes))
    if shards > 1:
        index = {"weight_map": {f"t{number}": name for number, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama4_text", "seed": seed}))
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(json.dumps({"filler": "x" * 6000}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("of no use")
    (folder / "pytorch_model.bin").write_bytes(bytes(5000))
    return folder


SERVED = ("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
"""Of a made-up model what serving needs."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(405, {}, b"")

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append(path)
            self.hub.headers.append({name.lower(): value for name, value in self.headers.items()})
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self._list(match[1], match[2] or "main")
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._resolve(*match.groups())
            elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", path):
                self._content(*match.groups())
            else:
                self._answer(404, {}, b"{}")

    def _repository(self, name: str, is_listing: bool) -> Repository | None:
        repository = self.hub.repositories.get(name)
        may_see = repository is not None and (
            not repository.token
            or (repository.is_gated and is_listing)
            or self.headers.get("Authorization") == f"Bearer {repository.token}"
        )
        if may_see:
            return repository
        if repository is not None and repository.is_gated:
            self._answer(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": f"{name} is gated"}, b"{}")
        else:
            self._answer(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}")
        return None

    def _refused(self, what: str) -> bool:
        if refusals := self.hub.refusals.get(what):
            self._answer(*refusals.pop(0), b"{}")
            return True
        return False

    def _list(self, name: str, revision: str) -> None:
        if self._refused("api") or (repository := self._repository(name, True)) is None:
            return
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            self._answer(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
            return
        siblings = [_sibling(file, content) for file, content in repository.commits[commit].items()]
        body = json.dumps({"id": name, "modelId": name, "sha": commit, "siblings": siblings})
        self._answer(200, {"Content-Type": "application/json"}, body.encode())

    def _resolve(self, name: str, commit: str, file: str) -> None:
        if self._refused(file) or (repository := self._repository(name, False)) is None:
            return
        content = repository.commits[commit].get(file)
        if content is None:
            self._answer(404, {"X-Error-Code": "EntryNotFound"}, b"{}")
        elif len(content) < LFS_BYTES:
            self._content(name, commit, file)
        else:
            headers = {
                "Location": f"{self.hub.address.replace('127.0.0.1', 'localhost')}/cdn/{name}/{commit}/{file}",
                "X-Repo-Commit": commit,
                "X-Linked-Size": str(len(content)),
                "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            }
            self._answer(302, headers, b"")

    def _content(self, name: str, commit: str, file: str) -> None:
        hub = self.hub
        hub.gate.wait(30)
        content = hub.repositories[name].commits[commit][file]
        if file in hub.damaged:
            content = bytes([content[0] ^ 1]) + content[1:]
        start, stop, status, headers = 0, len(content), 200, {"X-Repo-Commit": commit, "ETag": '"etag"'}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and not hub.ignores_ranges:
            start, stop, status = int(wanted[1]), min(int(wanted[2] or stop - 1) + 1, stop), 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._head(status, {**headers, "Content-Length": str(stop - start)})
        cut = hub.cuts[file].pop(0) if hub.cuts.get(file) else None
        end = stop if cut is None else min(stop, start + cut)
        for at in range(start, end, 2**16):
            piece = content[at : min(at + 2**16, end)]
            self.wfile.write(piece)
            with hub.lock:
                hub.served[file] += len(piece)
            time.sleep(hub.pause_s)
        if cut is not None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(2)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self._head(status, {**headers, "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    described: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
    if len(content) >= LFS_BYTES:
        lfs = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
        # Of such a file it is the pointer's.
        described |= {"blobId": "0" * 40, "lfs": lfs}
    return described
