"""Memory that the ranks of one host share: found out between them, over the connections they have already.

The first of them makes it and tells the others where it is (/proc/PID/fd/FD); each proves that it opened this very
memory by saying what is written in it. Ranks that cannot (in other containers, say) talk over their connections.

The memory belongs to no file (memfd): it goes with the last process, however that ends.
"""

import logging
import mmap
import os
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path

from workers.exchange_links import Links

log = logging.getLogger(__name__)

_OFFER = struct.Struct("<QII36s32s")
_SECRET_BYTES = 16
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class HostMemory:
    """`memory` is that of `members` (places in the group, ascending, this rank among them), zeros at first."""

    memory: mmap.mmap
    members: list[int]


def share_memory(links: Links, neighbours: list[int], size: int) -> HostMemory:
    """Share `size` bytes with those of `neighbours`, the ranks of this host in group order, that can; 0: with none.

    Raises:
        ExchangeError: a neighbour is gone or silent.
    """
    alone = [links.index]
    if len(neighbours) == 1:
        return HostMemory(_private(size), alone)
    first, others = neighbours[0], neighbours[1:]
    if links.index == first:
        return _offer(links, others, size)
    offered, pid, memfd, boot_id, name = _OFFER.unpack(links.receive(first, _OFFER.size))
    memory, secret = None, bytes(_SECRET_BYTES)
    try:
        if not offered:
            raise OSError("it has none to share")
        if not size:
            raise OSError("this rank shares none")
        if offered != size:
            raise OSError(f"it has {offered} bytes, this rank needs {size}")
        memory = _open(f"/proc/{pid}/fd/{memfd}", name.rstrip(b"\0").decode(), offered, boot_id)
        secret = memory[:_SECRET_BYTES]
    except (OSError, ValueError) as error:
        log.warning("memory of %s cannot be shared (%s): rows go over TCP", links.peers[first], error)
    links.send(first, secret)
    verdict = links.receive(first, len(neighbours))
    members = [other for other, is_member in zip(neighbours, verdict, strict=True) if is_member]
    if memory is None or links.index not in members:
        return HostMemory(_private(size), alone)
    return HostMemory(memory, members)


def _offer(links: Links, others: list[int], size: int) -> HostMemory:
    memory, memfd, name = None, -1, f"caravan-{secrets.token_hex(8)}"
    secret = secrets.token_bytes(_SECRET_BYTES)
    try:
        if size:
            try:
                memfd = os.memfd_create(name)
                os.posix_fallocate(memfd, 0, size)  # now, or a write would end in SIGBUS when memory is short
                memory = mmap.mmap(memfd, size)
                memory[:_SECRET_BYTES] = secret
            except OSError as error:
                log.warning("no memory to share with this host's ranks (%s): rows go over TCP", error)
        offered = size if memory is not None else 0
        offer = _OFFER.pack(offered, os.getpid(), max(0, memfd), _boot_id(), name.encode())
        for other in others:
            links.send(other, offer)
        shares = [links.receive(other, _SECRET_BYTES) == secret for other in others]
        members = [links.index] + [other for other, does in zip(others, shares, strict=True) if does]
        if memory is not None:
            memory[:_SECRET_BYTES] = bytes(_SECRET_BYTES)
        for other in others:
            links.send(other, bytes([True, *shares]))
    finally:
        if memfd >= 0:
            os.close(memfd)
    return HostMemory(memory if memory is not None else _private(size), members)


def _open(path: str, name: str, size: int, boot_id: bytes) -> mmap.mmap:
    if boot_id != _boot_id():
        raise OSError("it runs on another machine")
    if name not in os.readlink(path):
        raise OSError("its process cannot be seen from here")
    memfd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(memfd, size)
    finally:
        os.close(memfd)


def _private(size: int) -> mmap.mmap:
    return mmap.mmap(-1, max(1, size))


def _boot_id() -> bytes:
    return _BOOT_ID.read_bytes().strip() if _BOOT_ID.exists() else secrets.token_hex(18).encode()
