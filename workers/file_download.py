"""Fetching one file: on from where it was left, through broken connections, to content that is known to be right."""

import os
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from workers.disk_room import keep_room
from workers.model_manifest import PARTIAL_SUFFIX, KeptFile, sync_folder
from workers.remote import ContentHash, FetchError, Remote, RemoteFile, TransientError

TRIES = 6
"""In a row that bring not one byte."""
BACKOFF_S = 1.0
"""Before the second try; doubled before each further one."""
LONGEST_WAIT_S = 300.0
"""A place that asks to be left alone for longer is not waited for."""
READ_BYTES = 8 * 2**20
SYNC_BYTES = 256 * 2**20


class HaltedError(Exception):
    """`halt` was set."""


def wait_time(tries: int, error: TransientError, what: str) -> float:
    """Seconds until the next try, after `tries` in a row have failed.

    Raises:
        FetchError: there is none: that was the last one, or the other side asks for more patience than there is.
    """
    what = str(error) if str(error).startswith(f"{what}:") else f"{what}: {error}"
    if error.retry_after_s > LONGEST_WAIT_S:
        raise FetchError(f"{what}; it asks to come back in {error.retry_after_s:.0f} s") from None
    if tries >= TRIES:
        raise FetchError(f"{what}; that was try {tries} of {TRIES}") from None
    return max(error.retry_after_s, BACKOFF_S * 2.0 ** (tries - 1))


class FileDownload:
    """Fetches a file to `folder`/NAME.partial, and renames it once it is whole and on the disk.

    Args:
        gate: held while the file is changed.
        halt: set, nothing is written any more once `gate` has been free.
        moved: told how many bytes of the file are there.
        say: told of a failed try, and with an empty note that it is over.
    """

    def __init__(
        self,
        remote: Remote,
        version: str,
        folder: Path,
        file: RemoteFile,
        gate: threading.Lock,
        halt: threading.Event,
        moved: Callable[[int], None],
        say: Callable[[str], None],
    ) -> None:
        self._remote, self._version, self._file = remote, version, file
        self._folder, self._partial = folder, folder / (file.name + PARTIAL_SUFFIX)
        self._gate, self._halt = gate, halt
        self._moved, self._say = moved, say
        self._at = 0
        self._synced = 0

    def run(self) -> KeptFile:
        """Raises UserError, FetchError, HaltedError, OSError."""
        damage = ""
        whole = self._folder / self._file.name
        with self._gate:
            self._check()
            # Put in place just before a kill, or damaged since: it is read again, and gone on with where it is short.
            if whole.exists():
                whole.replace(self._partial)
        for _ in range(2):
            fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                content = self._take_up(fd)
                self._fetch(fd, content)
                damage = content.mismatch()
                if not damage:
                    os.fsync(fd)
                    self._put_in_place()
                    return KeptFile(self._file.size, content.sha256())
            finally:
                os.close(fd)
            # What was there already may have been at fault: once more, from the start.
            self._say(f"{self._file.name} is damaged ({damage}); it is fetched again")
            with self._gate:
                self._check()
                self._partial.unlink(missing_ok=True)
        raise FetchError(f"{self._file.name} has come damaged twice: {damage}; what is stored there may be at fault")

    def _take_up(self, fd: int) -> ContentHash:
        """Read what an earlier attempt has left."""
        content = ContentHash(self._file)
        with self._gate:
            self._check()
            if os.fstat(fd).st_size > self._file.size:
                os.ftruncate(fd, 0)
            left = os.fstat(fd).st_size
            if self._file.size:
                keep_room(fd, self._file.size)
        self._moved(left)
        self._at = 0
        while self._at < left:
            self._check()
            piece = os.pread(fd, READ_BYTES, self._at)
            if not piece:
                break
            content.update(piece)
            self._at += len(piece)
        self._synced = self._at
        return content

    def _fetch(self, fd: int, content: ContentHash) -> None:
        tries = 0
        while self._at < self._file.size:
            before = self._at
            try:
                with closing(self._remote.read(self._version, self._file, self._at)) as pieces:
                    for piece in pieces:
                        self._write(fd, piece[: self._file.size - self._at], content)
                        if self._at == self._file.size:
                            break
                if self._at == before:
                    raise TransientError("the answer holds nothing")
                tries = 0
            except TransientError as error:
                tries = 1 if self._at > before else tries + 1
                seconds = wait_time(tries, error, self._file.name)
                self._say(f"{self._file.name}: {error}; trying again in {seconds:.0f} s")
                if self._halt.wait(seconds):
                    raise HaltedError from None

    def _write(self, fd: int, piece: bytes, content: ContentHash) -> None:
        content.update(piece)
        left = memoryview(piece)
        with self._gate:
            self._check()
            while left.nbytes:
                count = os.pwrite(fd, left, self._at)
                left = left[count:]
                self._at += count
        # What is written but not on the disk stays bounded.
        if self._at - self._synced >= SYNC_BYTES:
            os.fdatasync(fd)
            self._synced = self._at
        self._moved(self._at)
        self._say("")

    def _put_in_place(self) -> None:
        with self._gate:
            self._check()
            self._partial.rename(self._folder / self._file.name)
            sync_folder(self._folder)

    def _check(self) -> None:
        if self._halt.is_set():
            raise HaltedError
