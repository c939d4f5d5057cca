"""Room on a disk: how much there is, and keeping some before it is written."""

import ctypes
import errno
import os
from pathlib import Path

SPARE_BYTES = 64 * 2**20
"""Left free on the disk."""
_KEEP_SIZE = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def free_bytes(folder: Path) -> int:
    """Bytes of the file system that a user may still take.

    Raises:
        OSError: there is no such folder.
    """
    status = os.statvfs(folder)
    return status.f_frsize * status.f_bavail


def half_of_disk(folder: Path) -> int:
    """Bytes: the bound of a cache that has been given none.

    Raises:
        OSError: there is no such folder.
    """
    status = os.statvfs(folder)
    return status.f_frsize * status.f_blocks // 2


def held_bytes(path: Path) -> int:
    """Bytes of the disk that a file takes, kept room included; 0: there is no such file."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def keep_room(fd: int, nbytes: int) -> None:
    """Reserve room for a file's first `nbytes` bytes without making it longer, where the file system can.

    Raises:
        OSError: there is not as much.
    """
    while _LIBC.fallocate(fd, _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(nbytes)) != 0:
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def size_text(nbytes: int) -> str:
    """For a person."""
    return f"{nbytes / 1e6:,.1f} MB" if nbytes < 10**10 else f"{nbytes / 1e9:,.1f} GB"
