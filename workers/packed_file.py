"""The packed file itself: a checked header, then every tensor on a page of its own, with a checksum each. No torch.

    16 bytes   magic
    8 bytes    length of the header, little endian
    4 bytes    CRC-32 of the header
    header     JSON: fingerprint, source, type, and of every tensor its shape, offset, bytes and CRC-32
    tensors    each at a multiple of 4096 bytes, in the machine's own byte order

The checksum is zlib's CRC-32: at 3.8 GB/s a core it outruns the disks that packs lie on, and needs no further library.
"""

import fcntl
import json
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from workers.packed_layout import ITEM_BYTES, LAYOUT_VERSION, PackedTensor

MAGIC = b"caravan weights\n"
PARTIAL = b"caravan partial\n"
PAGE = 4096
CHUNK = 16 * 2**20
MAX_HEADER_BYTES = 256 * 2**20
SYNC_BYTES = 256 * 2**20
LOCK_BOUND_S = 10.0
_PREFIX = struct.Struct("<16sQI")
_STATE = struct.Struct("<16sQQ")


class PackDamagedError(Exception):
    """A file is no pack, or not a whole one; the message is one sentence without the file's name."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    shape: tuple[int, ...]
    offset: int
    """Bytes from the file's start, a multiple of 4096."""
    nbytes: int
    crc32: int = 0


@dataclass(frozen=True)
class Header:
    """What a pack says of itself."""

    fingerprint: str
    source: str
    """The checkpoint's folder when it was packed."""
    dtype: str
    created: int
    """Seconds since 1970."""
    tensors: dict[str, Entry] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's name without its suffix: another for whatever differs in content."""
        return pack_name(self.fingerprint, self.dtype)

    @property
    def file_bytes(self) -> int:
        return max((entry.offset + entry.nbytes for entry in self.tensors.values()), default=0)

    def to_bytes(self) -> bytes:
        """The header and what stands before it. The length does not depend on checksums."""
        described = {
            "version": LAYOUT_VERSION,
            "fingerprint": self.fingerprint,
            "source": self.source,
            "dtype": self.dtype,
            "created": self.created,
            "tensors": {
                name: {"shape": e.shape, "offset": e.offset, "nbytes": e.nbytes, "crc32": f"{e.crc32:08x}"}
                for name, e in self.tensors.items()
            },
        }
        text = json.dumps(described, separators=(",", ":")).encode()
        return _PREFIX.pack(MAGIC, len(text), zlib.crc32(text)) + text


def pack_name(fingerprint: str, dtype: str) -> str:
    """Name of a checkpoint's pack in a cache, without suffix."""
    return f"{fingerprint}-{dtype}-v{LAYOUT_VERSION}"


def plan_header(tensors: list[PackedTensor], dtype: str, fingerprint: str, source: str) -> Header:
    """Offsets for all tensors; checksums are still 0."""
    header = Header(fingerprint, source, dtype, int(time.time()))
    # Offsets change the header's length, by digits: room is left for the longest that can be.
    unplaced = {t.name: Entry(t.shape, 10**16, t.numel * ITEM_BYTES[dtype]) for t in tensors}
    offset = _page_up(len(replace(header, tensors=unplaced).to_bytes()))
    placed = {}
    for name, entry in unplaced.items():
        placed[name] = replace(entry, offset=offset)
        offset = _page_up(offset + entry.nbytes)
    return replace(header, tensors=placed)


def read_header(fd: int) -> Header:
    """Header of an open file, checked as every start checks it: magic, version, its checksum, the file's length.

    Raises:
        PackDamagedError: it is none.
        OSError: it cannot be read.
    """
    prefix = os.pread(fd, _PREFIX.size, 0)
    if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
        raise PackDamagedError("it is no packed file")
    _, length, crc = _PREFIX.unpack(prefix)
    size = os.fstat(fd).st_size
    if length > min(MAX_HEADER_BYTES, size):
        raise PackDamagedError("its header is cut off")
    text = os.pread(fd, length, _PREFIX.size)
    if len(text) != length or zlib.crc32(text) != crc:
        raise PackDamagedError("its header does not match the header's checksum")
    try:
        header = _parse(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise PackDamagedError(f"its header cannot be understood ({error!r})") from None
    if header.file_bytes != size:
        raise PackDamagedError(f"it is {size} bytes long where its header says {header.file_bytes}")
    return header


def checksum(fd: int, entry: Entry, progress: Callable[[int], None] = lambda count: None) -> int:
    """CRC-32 of a tensor as it lies in the file; `progress(bytes)` is called for every chunk.

    Raises:
        PackDamagedError: the file ends within it.
        OSError: it cannot be read.
    """
    crc, done = 0, 0
    while done < entry.nbytes:
        chunk = os.pread(fd, min(CHUNK, entry.nbytes - done), entry.offset + done)
        if not chunk:
            raise PackDamagedError("it ends within a tensor")
        crc = zlib.crc32(chunk, crc)
        done += len(chunk)
        progress(len(chunk))
    return crc


def damaged_tensors(fd: int, header: Header, progress: Callable[[int], None] = lambda count: None) -> Iterator[str]:
    """Names of the tensors that are not what was packed."""
    for name, entry in header.tensors.items():
        if checksum(fd, entry, progress) != entry.crc32:
            yield name


class Writer:
    """Fills an open, empty file: tensors in any number of pieces, front to back, the header at last.

    Until then the file's first bytes say how far it is, for who waits for it (`read_state`).
    """

    def __init__(self, fd: int, header: Header) -> None:
        self._fd = fd
        self._header = header
        self._synced = 0
        self.written = 0
        """Bytes of tensors."""
        self.total = sum(entry.nbytes for entry in header.tensors.values())
        self._done: dict[str, int] = {}
        self._crc: dict[str, int] = {}

    def write(self, name: str, piece: memoryview) -> None:
        """Append a piece (bytes) to a tensor.

        Raises:
            OSError: no space, or the disk failed.
        """
        entry, done = self._header.tensors[name], self._done.get(name, 0)
        assert done + piece.nbytes <= entry.nbytes
        self._crc[name] = zlib.crc32(piece, self._crc.get(name, 0))
        offset = entry.offset + done
        left = piece
        while left.nbytes:
            count = os.pwrite(self._fd, left, offset)
            left, offset = left[count:], offset + count
        self._done[name] = done + piece.nbytes
        self.written += piece.nbytes
        # What is written but not on the disk stays bounded, and whoever waits sees real progress.
        if self.written - self._synced >= SYNC_BYTES:
            os.fdatasync(self._fd)
            self._synced = self.written
        os.pwrite(self._fd, _STATE.pack(PARTIAL, self.written, self.total), 0)

    def finish(self) -> None:
        """Write the header and wait for the disk."""
        assert self.written == self.total
        sealed = {name: replace(e, crc32=self._crc.get(name, 0)) for name, e in self._header.tensors.items()}
        content = replace(self._header, tensors=sealed).to_bytes()
        os.pwrite(self._fd, content, 0)
        os.fsync(self._fd)


def read_state(fd: int) -> tuple[int, int]:
    """Bytes written and in all of a pack in the making; (0, 0) where it does not say."""
    state = os.pread(fd, _STATE.size, 0)
    if len(state) < _STATE.size or not state.startswith(PARTIAL):
        return 0, 0
    _, done, total = _STATE.unpack(state)
    return done, total


class PackFile:
    """An open pack under a shared lock: for as long as this or a mapping of it lives, it is known to be in use.

    Raises:
        FileNotFoundError: there is none.
        PackDamagedError: it is none.
        OSError: it cannot be read or locked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = _open_shared(path)
        try:
            self.header = read_header(self.fd)
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        os.close(self.fd)


def is_still(fd: int, path: Path) -> bool:
    """Is the open file the one that the path names now?"""
    try:
        named, opened = os.stat(path), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def try_lock(fd: int, kind: int, bound_s: float = 0.0) -> bool:
    """Lock an open file (`fcntl.LOCK_SH` or `LOCK_EX`) until every copy of `fd` is closed; False: not within the bound.

    Raises:
        OSError: this file system has no locks.
    """
    deadline = time.monotonic() + bound_s
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)


def _open_shared(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Held exclusively only by who is about to remove it, for less than a moment.
            if not try_lock(fd, fcntl.LOCK_SH, LOCK_BOUND_S):
                raise TimeoutError(f"{path}: locked by another process for {LOCK_BOUND_S:g} s")
            if is_still(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _parse(described: Any) -> Header:
    if described["version"] != LAYOUT_VERSION:
        raise ValueError(f"layout {described['version']}")
    tensors = {
        name: Entry(tuple(entry["shape"]), int(entry["offset"]), int(entry["nbytes"]), int(entry["crc32"], 16))
        for name, entry in described["tensors"].items()
    }
    return Header(
        str(described["fingerprint"]),
        str(described["source"]),
        str(described["dtype"]),
        int(described["created"]),
        tensors,
    )


def _page_up(offset: int) -> int:
    return -(-offset // PAGE) * PAGE
