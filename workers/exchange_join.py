"""Joining the exchange of an epoch: connections to all its ranks, memory with those of the same host."""

import logging
import socket
import time
from pathlib import Path

from workers.abort_signal import AbortSignal
from workers.errors import UserError
from workers.exchange_links import Links, Peer
from workers.exchange_listener import ExchangeListener
from workers.host_memory import share_memory
from workers.kernels.build import KernelError
from workers.mesh_exchange import MeshExchange, MeshShape, memory_bytes
from workers.plain_exchange import PlainExchange

log = logging.getLogger(__name__)

_MOST_SEND_BUFFER = Path("/proc/sys/net/core/wmem_max")


def join_mesh(
    listener: ExchangeListener,
    epoch: int,
    peers: list[Peer],
    shape: MeshShape,
    abort: AbortSignal,
    join_timeout_s: float,
    kind: str = "auto",
) -> MeshExchange | PlainExchange:
    """Meet the other members of an epoch; all of them call this. `peers` are in group order, this rank among them.

    Args:
        abort: the exchange's from now on. Until this returns, setting it ends the joining, from any thread; afterwards
            the exchange has its own `abort`.
        join_timeout_s: for everything together. Ranks come when their weights are loaded, so the slowest decides.
        kind: "auto": shared memory between ranks of a host, where they can; "tcp": none; "shared": between all.

    Raises:
        ExchangeError: a peer cannot be reached, refused, is gone or did not come, and is named; or `abort` was set.
        UserError: "shared" was asked for, but some rank cannot share memory with this one.
    """
    index = [peer.rank for peer in peers].index(listener.rank)
    links = Links(peers, index, abort, time.monotonic() + join_timeout_s)
    try:
        links.connect(listener, epoch)
        _fit_send_buffers(links, shape)
        own = peers[index].host
        neighbours = [other for other, peer in enumerate(peers) if peer.host == own] if kind != "tcp" else [index]
        size = _memory_bytes(shape, len(neighbours))
        memory = share_memory(links, neighbours, size)
        if kind == "shared" and len(memory.members) < len(peers):
            raise UserError(
                "exchange: shared is asked for, but not all ranks can share memory (their logs say why); use auto"
            )
        return MeshExchange(links, memory, shape, epoch) if size else PlainExchange(links, shape, epoch)
    except BaseException:
        links.close()
        abort.close()
        raise


def _fit_send_buffers(links: Links, shape: MeshShape) -> None:
    """Room for a step's rows, so that sending is one call. Where the kernel grants less than that, it is left to size
    buffers as it sees fit, which may be more. Buffers for receiving it sizes well by itself."""
    wanted = shape.capacity * (shape.row_bytes + 8)
    try:
        granted = int(_MOST_SEND_BUFFER.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return
    for sock in links.sockets.values():
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < wanted <= granted:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, wanted)


def _memory_bytes(shape: MeshShape, ranks: int) -> int:
    """0 without kernels, which whatever is shared would be read and written by."""
    try:
        return memory_bytes(shape, ranks)
    except KernelError as error:
        log.warning("rows go over TCP, from Python, since this host has no kernels: %s", error)
        return 0
