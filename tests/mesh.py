"""Ranks of an exchange as threads of one process: waiting lets go of Python's lock, so they wait like processes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from workers.abort_signal import AbortSignal
from workers.exchange_join import join_mesh
from workers.exchange_links import Peer
from workers.exchange_listener import ExchangeListener
from workers.mesh_exchange import MeshExchange, MeshShape

T = TypeVar("T")
GANG = "gang-1"


@contextmanager
def listeners(hosts: Sequence[str], gang: str = GANG) -> Iterator[list[ExchangeListener]]:
    """Of ranks 0 to n - 1, incarnation 1."""
    with ExitStack() as stack:
        made = []
        for rank, host in enumerate(hosts):
            made.append(ExchangeListener(gang, rank, 1, host))
            stack.callback(made[-1].close)
        yield made


def peers_of(listeners: Sequence[ExchangeListener]) -> list[Peer]:
    return [Peer(each.rank, each.incarnation, each.host, each.address) for each in listeners]


def join(
    listeners: Sequence[ExchangeListener],
    epoch: int = 1,
    shape: MeshShape | None = None,
    kind: str = "auto",
    timeout_s: float = 20.0,
) -> list[MeshExchange]:
    peers = peers_of(listeners)
    shape = shape or MeshShape(capacity=64, rows_per_token=1, row_bytes=256, timeout_s=timeout_s)
    return together(
        lambda rank: join_mesh(listeners[rank], epoch, peers, shape, AbortSignal(), timeout_s, kind), len(peers)
    )


def together(function: Callable[[int], T], size: int) -> list[T]:
    """function(0) to function(size - 1) at once; what each returned. Raises what the first of them raised."""
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(function, range(size)))


def outcomes(function: Callable[[int], Any], size: int) -> list[Any]:
    """As `together`, with exceptions as results."""

    def guarded(rank: int) -> Any:
        try:
            return function(rank)
        except Exception as error:
            return error

    return together(guarded, size)


@contextmanager
def mesh(hosts: Sequence[str], **options: Any) -> Iterator[list[MeshExchange]]:
    with listeners(hosts) as made:
        exchanges = join(made, **options)
        try:
            yield exchanges
        finally:
            for exchange in exchanges:
                exchange.close()
