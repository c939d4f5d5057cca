"""The exchange of an epoch: which kind its ranks take, and how joining it can be cut short."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from protos import gang_pb2
from workers.abort_signal import AbortSignal
from workers.config import RankConfig
from workers.errors import ExchangeError
from workers.exchange import Exchange, LocalExchange
from workers.exchange_join import join_mesh
from workers.exchange_links import Peer
from workers.exchange_listener import ExchangeListener
from workers.mesh_exchange import MeshShape
from workers.torch_exchange import TorchExchange

JOIN_SECONDS = 3600.0
"""For the slowest rank's weights; the leader, which sees whether they get on, ends the wait much earlier."""


@dataclass(frozen=True)
class Rows:
    """What a model's ranks exchange."""

    per_token: int
    """Experts a token goes to."""
    dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def row_bytes(self) -> int:
        return self.dim * self.dtype.itemsize


def join_exchange(
    epoch: gang_pb2.Epoch,
    config: RankConfig,
    rows: Rows,
    listener: ExchangeListener,
    attach: Callable[[Callable[[], None]], None],
) -> Exchange:
    """Meet the other members of an epoch, each of which calls this.

    Args:
        attach: is given what ends the joining, and then what aborts the exchange: to be called from any thread.

    Raises:
        ExchangeError: a peer is gone or did not come, or the joining was ended.
        RuntimeError: this incarnation of the rank is no member.
    """
    me = config.rank, config.incarnation
    members = [(member.rank, member.incarnation) for member in epoch.members]
    if me not in members:
        there = ", ".join(f"{rank} of {incarnation}" for rank, incarnation in members)
        raise RuntimeError(f"epoch {epoch.epoch} has no rank {me[0]} of incarnation {me[1]}: it has {there}")
    engine, size = config.engine, len(members)
    exchange: Exchange
    if size == 1:
        exchange = LocalExchange()
    elif rows.device.type == "cpu" and engine.exchange != "torch":
        # The first exchange has a row for everybody.
        capacity = max(engine.max_num_batched_tokens, size) * rows.per_token
        shape = MeshShape(capacity, rows.per_token, rows.row_bytes, engine.exchange_timeout_s)
        peers = [Peer(each.rank, each.incarnation, each.host, each.exchange_address) for each in epoch.members]
        joining = AbortSignal()
        attach(joining.set)
        exchange = join_mesh(listener, epoch.epoch, peers, shape, joining, JOIN_SECONDS, engine.exchange)
    else:
        where = (epoch.store_address, epoch.epoch, members.index(me), size, config.host, rows.device)
        what = (rows.per_token, rows.row_bytes, engine.exchange_timeout_s)
        hosts = [member.host for member in epoch.members]
        joined = _Joining(lambda: TorchExchange(*where, *what, hosts=hosts))
        attach(joined.give_up)
        exchange = joined.wait()
    attach(exchange.abort)
    return exchange


class _Joining:
    """Makes an exchange in a thread of its own: torch.distributed has no way to end the forming of a group, so who
    gives it up leaves the thread behind, until its time is over."""

    def __init__(self, make: Callable[[], Exchange]) -> None:
        self._make = make
        self._condition = threading.Condition()
        self._exchange: Exchange | None = None
        self._error: Exception | None = None
        self._is_given_up = False
        threading.Thread(target=self._run, name="exchange-join", daemon=True).start()

    def give_up(self) -> None:
        with self._condition:
            self._is_given_up = True
            self._condition.notify()

    def wait(self) -> Exchange:
        with self._condition:
            self._condition.wait_for(lambda: self._is_given_up or self._exchange or self._error, JOIN_SECONDS)
            if self._exchange is not None:
                return self._exchange
            self._is_given_up = True
            raise self._error or ExchangeError("the group was not formed: its epoch is over")

    def _run(self) -> None:
        try:
            exchange, error = self._make(), None
        except Exception as failure:
            exchange, error = None, failure
        with self._condition:
            if self._is_given_up and exchange is not None:
                exchange.close()
            else:
                self._exchange, self._error = exchange, error
            self._condition.notify()
