"""The folder of models fetched to this host, with a bound: who fetches one, who uses it, which go when room is needed.

Every model has a folder of its own, and in it a lock (flock): exclusive for who fetches or removes, shared for who
serves. Locks end with their process, so nothing has to be cleaned up after a kill: who waited takes over.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from workers.cache_folder import cache_folder
from workers.disk_room import SPARE_BYTES, free_bytes, half_of_disk, held_bytes, size_text
from workers.model_manifest import JOURNAL, MANIFEST, Manifest, is_whole, read_manifest, write_manifest
from workers.model_source import ModelSource
from workers.packed_file import is_still, try_lock
from workers.remote import FetchError

log = logging.getLogger(__name__)

LOCK = ".lock"
LOCK_BOUND_S = 10.0
LOOK_BOUND_S = 0.03
"""Somebody who only looks has a lock for less."""
STATE_BYTES = 1024


@dataclass(frozen=True)
class CachedModel:
    """A model's folder, whole or not."""

    folder: Path
    manifest: Manifest | None
    """Of a partial one its journal; None where it says nothing at all."""
    is_whole: bool
    is_in_use: bool
    """Served, or being fetched, by some process."""
    nbytes: int
    """Of the disk."""
    last_use: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class FetchState:
    """How far another process is: what it writes into the lock's file."""

    done: int = 0
    total: int = 0
    """Bytes."""
    beat: int = 0
    """Grows whenever anything happens."""
    file: str = ""
    note: str = ""


class ModelLock:
    """Held until `close`, or until this process ends."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        """Closing twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def write(self, state: FetchState) -> None:
        """Tell who waits; for who holds it exclusively."""
        short = replace(state, file=state.file[:200], note=state.note[:200])
        os.pwrite(self._fd, json.dumps(short.__dict__).encode()[:STATE_BYTES].ljust(STATE_BYTES), 0)

    def __enter__(self) -> "ModelLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def default_models_folder() -> Path:
    """$XDG_CACHE_HOME/caravan/models, else ~/.cache/caravan/models.

    Raises:
        FetchError: there is no home folder.
    """
    try:
        return cache_folder("models")
    except OSError as error:
        raise FetchError(str(error)) from None


def folder_name(source: ModelSource, version: str) -> str:
    """Name of a version's folder: for people to read, and another one for whatever is another model."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "--", source.base).strip("-.")
    digest = hashlib.sha256(f"{source.base} {version}".encode()).hexdigest()[:12]
    return f"{slug[:120]}--{version[:8]}-{digest}"


class ModelCache:
    """The models of one folder.

    Args:
        limit_bytes: all of them together; 0: half of the file system the folder lies on.
    """

    def __init__(self, folder: Path, limit_bytes: int = 0) -> None:
        self.folder = folder
        self._limit_bytes = limit_bytes

    @property
    def limit_bytes(self) -> int:
        """Most bytes of all models together."""
        return self._limit_bytes or half_of_disk(self.folder)

    def models(self) -> list[CachedModel]:
        """All folders of models, the one used last first.

        Raises:
            OSError: the folder cannot be read; one that is not there is empty.
        """
        found = []
        try:
            folders = [path.parent for path in self.folder.glob(f"*/{LOCK}")]
        except FileNotFoundError:
            return []
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                found.append(_describe(folder))
        return sorted(found, key=lambda model: -model.last_use)

    def find(self, source: ModelSource) -> CachedModel | None:
        """The whole copy that was last what `source` means; None: there is none.

        Raises:
            OSError: the folder cannot be read.
        """
        found = []
        for model in self.models():
            if not model.is_whole or model.manifest is None or model.manifest.source != source.base:
                continue
            if source.is_pinned and model.manifest.version == source.revision:
                return model
            if source.ref in model.manifest.seen:
                found.append((model.manifest.seen[source.ref], model))
        return max(found, key=lambda pair: pair[0])[1] if found else None

    def note_seen(self, folder: Path, source: ModelSource) -> None:
        """Remember that `source` means this whole model now; a cache that may only be read does without."""
        with contextlib.suppress(OSError):
            if (manifest := read_manifest(folder)) is not None:
                seen = {**manifest.seen, source.ref: int(time.time())}
                write_manifest(folder, replace(manifest, seen=seen))

    def claim(self, folder: Path) -> ModelLock | None:
        """A model's folder for this process alone, made if need be; None: another process has it.

        Raises:
            OSError: it cannot be made or locked.
        """
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if try_lock(fd, fcntl.LOCK_EX) and is_still(fd, folder / LOCK):
                return ModelLock(fd)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def state(self, folder: Path) -> FetchState:
        """How far the process is that has it."""
        try:
            with (folder / LOCK).open("rb") as file:
                return FetchState(**json.loads(file.read(STATE_BYTES)))
        except (OSError, ValueError, TypeError):
            return FetchState()

    def remove(self, folder: Path) -> bool:
        """Remove a model unless a process uses it; False: one does.

        Raises:
            OSError: it cannot be removed.
        """
        try:
            fd = _open_lock(folder)
        except FileNotFoundError:
            return True
        try:
            if not try_lock(fd, fcntl.LOCK_EX, LOOK_BOUND_S):
                return False
            if is_still(fd, folder / LOCK):
                remove_locked(folder)
            return True
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Two who make room at once would count the same room."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not try_lock(fd, fcntl.LOCK_EX, LOCK_BOUND_S):
                raise FetchError(f"{self.folder}: another process has made room in it for {LOCK_BOUND_S:g} s")
            yield
        finally:
            os.close(fd)

    def make_room(self, name: str, nbytes: int, keep: Path, say: Callable[[str], None]) -> None:
        """Remove the models used longest ago until a model of `nbytes` fits bound and disk in folder `keep`, which may
        hold some of it already.

        Args:
            name: the model's, for a sentence.
            say: told of what is removed.

        Raises:
            FetchError: it does not fit.
        """
        limit = self.limit_bytes
        here = socket.gethostname()
        if nbytes > limit:
            raise FetchError(
                f"{name} has {size_text(nbytes)}, and {self.folder} on {here} may hold {size_text(limit)}; raise "
                "models_cache_bytes in [serve], or name a folder on another disk with models_cache_dir"
            )
        others = [model for model in self.models() if model.folder != keep]
        unused = [model for model in others if not model.is_in_use]
        held = sum(model.nbytes for model in others)
        needed = max(nbytes - sum(held_bytes(path) for path in keep.iterdir()), 0)
        while held + nbytes > limit or needed + SPARE_BYTES > free_bytes(self.folder):
            if not unused:
                free = max(free_bytes(self.folder) - SPARE_BYTES, 0)
                raise FetchError(
                    f"no room for {name} in {self.folder} on {here}: it needs {size_text(needed)} more, "
                    f"and {size_text(free)} of the disk are free; "
                    f"{size_text(held)} of at most {size_text(limit)} there are other models in use"
                )
            oldest = unused.pop()
            if self.remove(oldest.folder):
                say(f"removed {oldest.folder.name} ({size_text(oldest.nbytes)}) to make room")
                held -= oldest.nbytes


def hold(folder: Path) -> ModelLock | None:
    """Keep a fetched model from being removed until the lock is closed or this process ends, and note its use; None:
    the folder is the user's own, which nobody removes.

    Raises:
        FetchError: it is gone, or is being removed.
    """
    try:
        fd = _open_lock(folder)
    except FileNotFoundError:
        if not (folder / MANIFEST).exists() and folder.is_dir():
            return None
        raise FetchError(f"{folder} has been removed; start again, and it is fetched anew") from None
    except OSError as error:
        raise FetchError(f"{folder}: cannot be locked ({error.strerror})") from None
    try:
        if not (
            try_lock(fd, fcntl.LOCK_SH, LOCK_BOUND_S) and is_still(fd, folder / LOCK) and (folder / MANIFEST).exists()
        ):
            raise FetchError(f"{folder} is being removed or fetched by another process; start again")
        with contextlib.suppress(OSError):
            os.utime(fd)
    except BaseException:
        os.close(fd)
        raise
    return ModelLock(fd)


def remove_locked(folder: Path) -> None:
    """A folder whose lock this process holds: first it is no whole model any more, at last it is gone.

    Raises:
        OSError: it cannot be.
    """
    for name in (MANIFEST, JOURNAL):
        (folder / name).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / LOCK).unlink()
    # Somebody may have begun to fetch into it again.
    with contextlib.suppress(OSError):
        folder.rmdir()


def _open_lock(folder: Path) -> int:
    try:
        # To be written, for some file systems of a network give no exclusive lock otherwise.
        return os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        return os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)


def _describe(folder: Path) -> CachedModel:
    fd = _open_lock(folder)
    try:
        is_in_use = not try_lock(fd, fcntl.LOCK_EX, LOOK_BOUND_S)
        last_use = os.fstat(fd).st_mtime
    finally:
        os.close(fd)
    manifest = read_manifest(folder)
    if manifest is None and (journal := read_manifest(folder, JOURNAL)) is not None:
        # One that was whole before it lost a file says when.
        manifest = replace(journal, fetched=0)
    nbytes = sum(held_bytes(path) for path in folder.iterdir())
    return CachedModel(folder, manifest, is_whole(folder), is_in_use, nbytes, last_use)
