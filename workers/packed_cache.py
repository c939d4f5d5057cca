"""A folder of packed files with a bound: who makes one, who waits for it, which go when room is needed. No torch here.

A pack in use is locked (flock, shared) by every process that maps it; one in the making, `NAME.partial`, exclusively by
who makes it. Locks end with their process, so nothing has to be cleaned up after a kill: who waited takes over.
"""

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from workers.cache_folder import cache_folder
from workers.disk_room import SPARE_BYTES, free_bytes, half_of_disk, keep_room, size_text
from workers.packed_file import Header, PackDamagedError, PackFile, Writer, is_still, read_header, read_state, try_lock

log = logging.getLogger(__name__)

SUFFIX, PARTIAL_SUFFIX = ".pack", ".partial"
POLL_S = 0.05
STALL_S = 120.0
"""Who waits for another process's pack gives up once it has not grown for this long."""

Report = Callable[[int, int], None]
"""Called with bytes packed so far and in all."""


class CacheUnusableError(Exception):
    """No pack can be had here now; weights can still be read from the checkpoint. One sentence."""


@dataclass(frozen=True)
class CachedPack:
    """A file of the cache."""

    path: Path
    nbytes: int
    last_use: float
    """Seconds since 1970."""
    is_in_use: bool
    """Mapped, or being packed, by some process."""
    is_partial: bool
    header: Header | None
    damage: str
    """Why there is no header; empty for partial files."""


def default_cache_folder() -> Path:
    """$XDG_CACHE_HOME/caravan/weights, else ~/.cache/caravan/weights.

    Raises:
        CacheUnusableError: there is no home folder.
    """
    try:
        return cache_folder("weights")
    except OSError as error:
        raise CacheUnusableError(str(error)) from None


class PackedCache:
    """The packs of one folder.

    Args:
        limit_bytes: all of the folder's packs together; 0: half of the file system it lies on.
    """

    def __init__(self, folder: Path, limit_bytes: int = 0) -> None:
        self.folder = folder
        self._limit_bytes = limit_bytes

    def get(
        self,
        name: str,
        header: Callable[[], Header],
        fill: Callable[[Writer, Callable[[], None]], None],
        report: Report = lambda done, total: None,
    ) -> PackFile:
        """The pack `name`, made if need be: by one process, while the others that ask for it wait.

        Args:
            header: called to plan a new pack.
            fill: writes all tensors, and calls its second argument now and then.
            report: told of progress, also of another process's; what it raises ends the attempt.

        Raises:
            CacheUnusableError: the folder cannot be written, there is no room, or who packs it gets nowhere.
        """
        path = self.folder / f"{name}{SUFFIX}"
        waiting = _Waiting(path)
        try:
            while True:
                try:
                    return self._open(path)
                except FileNotFoundError:
                    pass
                except PackDamagedError as error:
                    log.warning("%s is damaged (%s); it is packed again", path, error)
                    self._drop_damaged(path)
                fd = self._claim(path)
                if fd is None:
                    waiting.wait(report)
                    continue
                try:
                    self._make(fd, path, header(), fill, report)
                finally:
                    os.close(fd)
        except InterruptedError:
            raise  # by `report`
        except OSError as error:
            raise CacheUnusableError(_cannot(self.folder, error)) from error

    def files(self) -> list[CachedPack]:
        """All packs and partial files, the one used last first.

        Raises:
            OSError: the folder cannot be read; one that is not there is empty.
        """
        found = []
        for path in self._paths():
            with contextlib.suppress(FileNotFoundError):
                found.append(_describe(path))
        return sorted(found, key=lambda file: -file.last_use)

    def remove(self, path: Path) -> bool:
        """Remove a pack or partial file unless a process uses it; False: one does.

        Raises:
            OSError: it cannot be removed.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            if not try_lock(fd, fcntl.LOCK_EX):
                return False
            if is_still(fd, path):
                path.unlink()
            return True
        finally:
            os.close(fd)

    def _drop_damaged(self, path: Path) -> None:
        # Another process may have seen the same, and put a good one in its place since.
        with self._locked_folder(), contextlib.suppress(FileNotFoundError):
            try:
                self._open(path).close()
            except PackDamagedError:
                path.unlink()

    # ---- making ----------------------------------------------------------------------------------------------------

    def _open(self, path: Path) -> PackFile:
        pack = PackFile(path)
        if pack.header.name != path.stem:
            pack.close()
            raise PackDamagedError("it is another checkpoint's")
        # The time of the last use, by which room is made; a cache that may only be read does without.
        with contextlib.suppress(OSError):
            os.utime(path)
        return pack

    def _claim(self, path: Path) -> int | None:
        """The partial file of `path`, empty and locked; None: another process has it, or has just finished it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(PARTIAL_SUFFIX)
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if try_lock(fd, fcntl.LOCK_EX) and is_still(fd, partial):
                if not path.exists():
                    os.ftruncate(fd, 0)
                    return fd
                partial.unlink()
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def _make(
        self,
        fd: int,
        path: Path,
        header: Header,
        fill: Callable[[Writer, Callable[[], None]], None],
        report: Report,
    ) -> None:
        partial = path.with_suffix(PARTIAL_SUFFIX)
        try:
            with self._locked_folder():
                self._make_room(header.file_bytes, keep=partial)
                # A disk that is full says so before hours of packing, not after.
                keep_room(fd, header.file_bytes)
                os.ftruncate(fd, header.file_bytes)
            writer = Writer(fd, header)
            report(0, writer.total)
            fill(writer, lambda: report(writer.written, writer.total))
            writer.finish()
            partial.rename(path)
            _sync_folder(self.folder)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    @contextmanager
    def _locked_folder(self) -> Iterator[None]:
        """Two who make room at once would count the same room."""
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not try_lock(fd, fcntl.LOCK_EX, STALL_S):
                raise CacheUnusableError(f"{self.folder}: another process has made room in it for {STALL_S:g} s")
            yield
        finally:
            os.close(fd)

    def _make_room(self, nbytes: int, keep: Path) -> None:
        """Remove leftovers, then the packs used longest ago, until `nbytes` more fit bound and disk."""
        limit = self.limit_bytes
        files = [file for file in self.files() if file.path != keep]
        # Nobody holds these: who made them was killed.
        for file in [file for file in files if file.is_partial and not file.is_in_use]:
            if self.remove(file.path):
                files.remove(file)
        if nbytes > limit:
            raise CacheUnusableError(
                f"{self.folder}: a pack of {size_text(nbytes)} exceeds the bound of {size_text(limit)}, "
                "weights_cache_bytes"
            )
        unused = [file for file in files if not file.is_in_use]
        held = sum(file.nbytes for file in files)
        while held + nbytes > limit or nbytes + SPARE_BYTES > free_bytes(self.folder):
            if not unused:
                raise CacheUnusableError(
                    f"{self.folder}: no room for a pack of {size_text(nbytes)}: {size_text(held)} of at most "
                    f"{size_text(limit)} are in use there, and {size_text(free_bytes(self.folder))} of the disk "
                    "are free"
                )
            oldest = unused.pop()
            if self.remove(oldest.path):
                log.warning("removed %s (%s) to make room for another pack", oldest.path, size_text(oldest.nbytes))
                held -= oldest.nbytes

    @property
    def limit_bytes(self) -> int:
        """Most bytes of all packs together."""
        return self._limit_bytes or half_of_disk(self.folder)

    def _paths(self) -> list[Path]:
        try:
            return [path for path in sorted(self.folder.iterdir()) if path.suffix in (SUFFIX, PARTIAL_SUFFIX)]
        except FileNotFoundError:
            return []


class _Waiting:
    """For a pack that another process makes."""

    def __init__(self, path: Path) -> None:
        self._partial = path.with_suffix(PARTIAL_SUFFIX)
        self._state = (-1, -1)
        self._since = time.monotonic()

    def wait(self, report: Report) -> None:
        """One short while."""
        try:
            fd = os.open(self._partial, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # finished, or given up
        try:
            state = read_state(fd)
        finally:
            os.close(fd)
        if state != self._state:
            self._state, self._since = state, time.monotonic()
        if time.monotonic() - self._since > STALL_S:
            raise CacheUnusableError(
                f"{self._partial}: another process has been packing it and got nowhere for {STALL_S:g} s"
            )
        report(*state)  # (0, 0) before the first piece and after the last
        time.sleep(POLL_S)


def _describe(path: Path) -> CachedPack:
    is_partial = path.suffix == PARTIAL_SUFFIX
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        is_in_use = not try_lock(fd, fcntl.LOCK_EX)
        status = os.fstat(fd)
        header, damage = None, ""
        if not is_partial:
            try:
                header = read_header(fd)
            except PackDamagedError as error:
                damage = str(error)
        return CachedPack(path, status.st_size, status.st_mtime, is_in_use, is_partial, header, damage)
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _cannot(folder: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"{folder}: the disk is full"
    reason = error.strerror or str(error)
    return f"{folder}: cannot hold packed weights ({reason})"
