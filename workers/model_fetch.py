"""A model as a local folder, wherever it is: fetched once to a host, by who asks first, while others wait.

A fetch goes on where an earlier one was broken off. A copy is used only once it is whole and every file of it has been
checked. No network client is imported before it is needed.
"""

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from workers.disk_room import keep_room
from workers.errors import UserError
from workers.file_download import wait_time
from workers.hub_remote import HubRemote, is_offline, offline_sentence
from workers.model_cache import FetchState, ModelCache, ModelLock, folder_name, remove_locked
from workers.model_config import ModelConfig
from workers.model_download import Download, FetchProgress, FetchStoppedError, adopt
from workers.model_manifest import JOURNAL, MANIFEST, PARTIAL_SUFFIX, Manifest, is_whole, read_manifest, write_manifest
from workers.model_source import ModelSource, SourceKind, repository_hint
from workers.remote import (
    INDEX,
    FetchError,
    Listing,
    Remote,
    RemoteFile,
    TransientError,
    is_weights,
    needed_files,
)
from workers.url_remote import UrlRemote

POLL_S = 0.1
STALL_S = 120.0
"""Who waits for another process's fetch gives up once that has given no sign of life for this long."""

Report = Callable[[FetchProgress], None]


def fetch(
    source: ModelSource,
    cache_folder: Path,
    report: Report = lambda progress: None,
    stop: threading.Event | None = None,
    *,
    offline: bool = False,
    limit_bytes: int = 0,
) -> Path:
    """The local folder of a model, fetched into the cache if it is not there.

    A branch or a URL is asked for what it means now; where it does not answer, the copy it last meant is used, and
    `report` says so. What serves from the folder should `model_cache.hold` it, so that nobody removes it meanwhile.

    Args:
        cache_folder: where models are kept; see `model_cache.default_models_folder`.
        report: told some times a second how far it is, by this thread, also while another process fetches; what it
            raises ends the attempt.
        stop: once set, the attempt ends; what has been fetched stays.
        offline: request nothing; the environment's HF_HUB_OFFLINE says the same for the hub.
        limit_bytes: all fetched models together; 0: half of the file system.

    Raises:
        UserError: there is no such model, it may not be seen, it cannot be served, or offline it is not there.
        FetchError: it cannot be had now: no answer, no room, content that is not what the place says.
        FetchStoppedError: `stop` was set.
    """
    if source.is_local:
        return local_folder(source)
    cache = ModelCache(cache_folder, limit_bytes)
    try:
        return _Fetch(source, cache, report, stop or threading.Event(), offline).run()
    except InterruptedError:
        raise  # by `report`
    except OSError as error:
        raise FetchError(_cannot(source, cache_folder, error)) from error


def fetched(source: ModelSource, cache_folder: Path) -> Path | None:
    """The folder of a model if it is there whole, without a request; None: it would have to be fetched.

    Raises:
        UserError: a local folder is not there.
        FetchError: the cache cannot be read.
    """
    if source.is_local:
        return local_folder(source)
    try:
        copy = ModelCache(cache_folder).find(source)
    except OSError as error:
        raise FetchError(_cannot(source, cache_folder, error)) from error
    return copy.folder if copy is not None else None


def pinned(source: ModelSource, folder: Path) -> ModelSource:
    """`source` at the very version that was fetched to `folder`, for hosts that must have the same; what has no
    versions of its own, as it is."""
    manifest = None if source.is_local else read_manifest(folder)
    return source.at(manifest.version) if manifest is not None else source


def local_folder(source: ModelSource) -> Path:
    """Raises UserError: it is not there."""
    folder = source.path
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "no such folder"
        raise UserError(
            f"model: {folder}: {what}; give the folder of a Hugging Face checkpoint{repository_hint(folder)}"
        )
    return folder


class _Fetch:
    def __init__(
        self, source: ModelSource, cache: ModelCache, report: Report, stop: threading.Event, offline: bool
    ) -> None:
        self._source = source
        self._cache = cache
        self._report = report
        self._stop = stop
        self._may_ask = not (offline and source.needs_network) and not (source.kind == SourceKind.HUB and is_offline())
        self._beat = 0

    def run(self) -> Path:
        copy = self._cache.find(self._source)
        if not self._may_ask:
            if copy is None:
                raise UserError(offline_sentence(self._source))
            return copy.folder
        if copy is not None and self._source.is_pinned:
            return copy.folder
        remote = open_remote(self._source)
        try:
            listing = self._ask(remote, may_give_up=copy is not None)
        except _UnansweredError as error:
            # Hosts start while their network does not.
            assert copy is not None
            assert copy.manifest is not None
            when = time.strftime("%Y-%m-%d", time.localtime(copy.manifest.fetched))
            self._say(f"{self._source}: {error}; the copy fetched on {when} is used")
            return copy.folder
        if copy is not None and copy.manifest is not None and copy.manifest.version == listing.version:
            self._cache.note_seen(copy.folder, self._source)
            return copy.folder
        folder = self._cache.folder / folder_name(self._source, listing.version)
        self._get(remote, listing, folder)
        return folder

    def _ask(self, remote: Remote, may_give_up: bool = False) -> Listing:
        """What the source means now."""
        tries = 0
        self._say(f"asking for {self._source}")
        while True:
            if self._stop.is_set():
                raise FetchStoppedError(f"{self._source}: stopped")
            try:
                return remote.listing()
            except TransientError as error:
                if may_give_up:
                    raise _UnansweredError(str(error)) from None
                tries += 1
                seconds = wait_time(tries, error, str(self._source))
                self._say(f"{self._source}: {error}; trying again in {seconds:.0f} s")
                self._stop.wait(seconds)

    def _get(self, remote: Remote, listing: Listing, folder: Path) -> None:
        waiting = _Waiting(self._cache, folder)
        while not is_whole(folder):
            if self._stop.is_set():
                raise FetchStoppedError(f"{self._source}: stopped")
            lock = self._cache.claim(folder)
            if lock is None:
                self._report(waiting.wait(self._stop))
                continue
            with lock:
                if not is_whole(folder):
                    self._make(remote, listing, folder, lock)
        self._cache.note_seen(folder, self._source)

    def _make(self, remote: Remote, listing: Listing, folder: Path, lock: ModelLock) -> None:
        source = self._source
        if (folder / MANIFEST).exists():
            # A file of it is gone or has another length. What is whole need not come again.
            (folder / MANIFEST).rename(folder / JOURNAL)
        empty = Manifest(source.base, listing.version, 0)
        files = needed_files(listing.files, None)
        download = Download(remote, folder, adopt(read_manifest(folder, JOURNAL) or empty, folder, files), self._stop)

        def tick() -> None:
            self._beat += 1
            progress = download.progress()
            lock.write(FetchState(progress.bytes_done, progress.bytes_total, self._beat, progress.file, progress.note))
            self._report(progress)

        settings = [file for file in files if not is_weights(file)]
        try:
            # Before hours of weights that nobody could use.
            _check_settings(source, settings)
            download.run(settings, tick)
            ModelConfig.from_folder(folder)
            files = needed_files(listing.files, _weights(source, folder, listing))
        except UserError:
            _forget_unless_begun(folder)
            raise
        download.journal = replace(download.journal, total=sum(file.size for file in files))
        self._make_room(files, folder)
        download.run(files, tick)
        if source.kind == SourceKind.URL and self._ask(remote).version != listing.version:
            raise FetchError(f"{source} was changed while it was fetched; start again")
        now = int(time.time())
        write_manifest(folder, replace(download.journal, fetched=now, seen={source.ref: now}))
        _remove_leftovers(folder)

    def _make_room(self, files: Sequence[RemoteFile], folder: Path) -> None:
        total = sum(file.size for file in files)
        with self._cache.locked():
            self._cache.make_room(str(self._source), total, folder, self._say)
            # Kept before the next who wants to know how much there is.
            for file in files:
                if file.size and not (folder / file.name).exists():
                    fd = os.open(folder / (file.name + PARTIAL_SUFFIX), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
                    try:
                        keep_room(fd, file.size)
                    finally:
                        os.close(fd)

    def _say(self, note: str) -> None:
        self._report(FetchProgress(0, 0, note=note))


class _UnansweredError(Exception):
    """A source that there is a copy of does not answer."""


class _Waiting:
    """For a model that another process fetches."""

    def __init__(self, cache: ModelCache, folder: Path) -> None:
        self._cache = cache
        self._folder = folder
        self._state: FetchState | None = None
        self._since = time.monotonic()

    def wait(self, stop: threading.Event) -> FetchProgress:
        """One short while."""
        stop.wait(POLL_S)
        if (self._folder / MANIFEST).exists() and not is_whole(self._folder):
            raise FetchError(
                f"{self._folder}: a file of it is gone or has another length, and a process serves from it; end that, "
                "and start again"
            )
        state = self._cache.state(self._folder)
        if state != self._state:
            self._state, self._since = state, time.monotonic()
        if time.monotonic() - self._since > STALL_S:
            raise FetchError(
                f"{self._folder}: another process has been fetching it and gave no sign of life for {STALL_S:g} s"
            )
        return FetchProgress(state.done, state.total, state.file, state.note or "another process fetches it")


def open_remote(source: ModelSource) -> Remote:
    """The place of a hub's model or a URL.

    Raises:
        UserError: a library it needs is not installed, or nobody knows such a URL.
    """
    return HubRemote(source) if source.kind == SourceKind.HUB else UrlRemote(source)


def _check_settings(source: ModelSource, files: Sequence[RemoteFile]) -> None:
    names = {file.name for file in files}
    for name in ("config.json", "tokenizer.json"):
        if name not in names:
            raise UserError(f"{source} has no {name}; Caravan serves whole checkpoints in Hugging Face's layout")


def _weights(source: ModelSource, folder: Path, listing: Listing) -> list[str] | None:
    """Files of weights that the index names; None where there is no index."""
    if not (index := folder / INDEX).exists():
        if not any(is_weights(file) for file in listing.files):
            raise UserError(f"{source} holds no *.safetensors; Caravan reads no other weights")
        return None
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: its {INDEX} is no index of safetensors files ({error!r})") from None
    there = {file.name for file in listing.files}
    if missing := [name for name in names if name not in there]:
        raise UserError(f"{source}: {INDEX} names {missing[0]}, which is not there")
    return names


def _forget_unless_begun(folder: Path) -> None:
    """Of a model that cannot be served; where weights are there already, its files were right once."""
    if not any(".safetensors" in path.name and path.name != INDEX for path in folder.iterdir()):
        remove_locked(folder)


def _remove_leftovers(folder: Path) -> None:
    """What earlier attempts began and the model does not need."""
    for path in folder.glob(f"*{PARTIAL_SUFFIX}"):
        path.unlink(missing_ok=True)
    (folder / JOURNAL).unlink(missing_ok=True)


def _cannot(source: ModelSource, folder: Path, error: OSError) -> str:
    here = socket.gethostname()
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no room for {source}: the disk of {folder} on {here} is full, and what has been fetched is kept"
    return f"{source} cannot be kept in {folder} on {here} ({error.strerror or error})"
