"""What the pool's processes are asked to do. No transformers here: they would all import it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from prometheus_client import REGISTRY

from tests.local_engine import LocalRank, engine_config, greedy
from workers.abort_signal import AbortSignal
from workers.exchange import Exchange, LocalExchange
from workers.exchange_join import join_mesh
from workers.exchange_links import Peer
from workers.exchange_listener import ExchangeListener
from workers.expert_map import ExpertMap
from workers.inbox import Add
from workers.mesh_exchange import MeshShape
from workers.prompt_limit import StepWork
from workers.rendezvous import connect
from workers.torch_exchange import TorchExchange

HIDDEN = 64
_exchanges: dict[str, Exchange] = {}


@dataclass(frozen=True)
class Spot:
    """One process's place in a group."""

    store_address: str
    index: int
    size: int
    device: str = "cpu"

    def exchange(
        self,
        epoch: int = 1,
        rows_per_token: int = 1,
        row_bytes: int = HIDDEN * 4,
        timeout_s: float = 30.0,
        hosts: int = 0,
        **more: Any,
    ) -> Exchange:
        """Over torch.distributed, or, given a number of `hosts`, as ranks of so many hosts do."""
        if hosts:
            shape = MeshShape(512, rows_per_token, row_bytes, timeout_s)
            return self._mesh(epoch, [host_of(index, self.size, hosts) for index in range(self.size)], shape, **more)
        device = torch.device(self.device)
        return TorchExchange(
            self.store_address,
            epoch,
            self.index,
            self.size,
            "127.0.0.1",
            device,
            rows_per_token,
            row_bytes,
            timeout_s,
            **more,
        )

    def _mesh(self, epoch: int, hosts: list[str], shape: MeshShape, kind: str = "auto") -> Exchange:
        listener = ExchangeListener("test", self.index, 1, hosts[self.index])
        try:
            store = dist.PrefixStore(f"mesh{epoch}", connect(self.store_address, shape.timeout_s))
            store.set(str(self.index), listener.address)
            addresses = [store.get(str(index)).decode() for index in range(self.size)]
            peers = [Peer(index, 1, hosts[index], address) for index, address in enumerate(addresses)]
            return join_mesh(listener, epoch, peers, shape, AbortSignal(), shape.timeout_s, kind)
        finally:
            listener.close()


def host_of(index: int, size: int, hosts: int) -> str:
    """Processes fill hosts evenly, neighbours together; each host is an address of the loopback."""
    return f"127.0.0.{1 + index * min(hosts, size) // size}"


# ---- exchanges that stay open between calls ----------------------------------------------------------------------


def open_exchange(name: str, spot: Spot, options: dict[str, Any]) -> None:
    use_device(spot)
    _exchanges[name] = spot.exchange(**options)


def use_device(spot: Spot) -> None:
    """Process i takes GPU i, as NCCL wants it."""
    if spot.device == "cuda":
        torch.cuda.set_device(spot.index)


def close_exchange(name: str) -> None:
    _exchanges.pop(name).close()


def agree(name: str, tokens: int) -> list[int]:
    return [work.tokens for work in _exchanges[name].agree(StepWork(prompt_tokens=tokens))]


@dataclass(frozen=True)
class Trip:
    """What a process saw of one dispatch and combine."""

    agreed: list[int]
    experts: list[int]
    """Of the rows that arrived."""
    came_home: bool
    """Whether combine(f(dispatch(x))) is f(x), bit for bit."""
    rows_sent: int
    bytes_sent: int
    bytes_received: int


def round_trip(
    name: str,
    tokens: int,
    processes: list[int],
    experts: list[int],
    dim: int,
    dtype: str,
    seed: int,
    device: str = "cpu",
) -> Trip:
    """Send random rows there and back, row r to processes[r] for experts[r]; f doubles and adds the expert's number."""
    exchange = _exchanges[name]
    before = exchange.rows_sent, exchange.bytes_sent, exchange.bytes_received
    x_RD = torch.randn(len(processes), dim, generator=torch.Generator().manual_seed(seed))
    x_RD = x_RD.to(device, getattr(torch, dtype))
    expert_R = torch.tensor(experts, dtype=torch.int64, device=device)
    agreed = [work.tokens for work in exchange.agree(StepWork(prompt_tokens=tokens))]
    dispatched = exchange.dispatch(x_RD, torch.tensor(processes, dtype=torch.int64, device=device), expert_R)
    assert dispatched.x_SD.dtype == x_RD.dtype
    assert dispatched.x_SD.shape == (len(dispatched.expert_S), dim)
    y_RD = exchange.combine(_compute(dispatched.x_SD, dispatched.expert_S), dispatched)
    # Not `equal` alone: it is also true of two empty tensors of different types.
    came_home = y_RD.dtype == x_RD.dtype and torch.equal(y_RD, _compute(x_RD, expert_R))
    after = exchange.rows_sent, exchange.bytes_sent, exchange.bytes_received
    sent = [now - then for now, then in zip(after, before, strict=True)]
    return Trip(agreed, dispatched.expert_S.tolist(), came_home, *sent)


def _compute(x_SD: torch.Tensor, expert_S: torch.Tensor) -> torch.Tensor:
    return x_SD * 2 + (expert_S % 1024)[:, None].to(x_SD.dtype)


def fail_to_agree(name: str, tokens: int) -> tuple[str, str]:
    """Agree where a peer will not: the error's type and sentence."""
    try:
        _exchanges[name].agree(StepWork(prompt_tokens=tokens))
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def fail_to_open(spot: Spot, timeout_s: float) -> tuple[str, str]:
    try:
        spot.exchange(timeout_s=timeout_s)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


# ---- engines -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What a gang serves: each rank its own requests, (number, prompt, max_tokens)."""

    folder: Path
    expert_map: ExpertMap
    members: list[int]
    """Ranks in process-group order."""
    requests: dict[int, list[tuple[int, list[int], int]]]
    """By rank."""
    config: dict[str, Any] = field(default_factory=dict)
    exchange: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """What one rank did."""

    outputs: dict[int, list[int]]
    """Tokens by the request's number."""
    expert_tokens: dict[tuple[int, int], int]
    """Rows it computed by (layer, logical expert)."""
    rows_sent: int
    bytes_sent: int
    bytes_received: int
    steps: int
    num_preemptions: int


def serve(spot: Spot, work: Work, gang: str) -> Served:
    """Join the gang, step with it until an agreement finds nobody with work, and leave."""
    use_device(spot)
    rank = work.members[spot.index]
    exchange: Exchange = LocalExchange() if spot.size == 1 else spot.exchange(**work.exchange)
    try:
        local = LocalRank(
            engine_config(work.folder, **{"device": spot.device, **work.config}),
            work.expert_map,
            rank,
            work.members,
            exchange,
            gang=gang,
        )
        sequences = [greedy(*request) for request in work.requests.get(rank, [])]
        for sequence in sequences:
            local.inbox.put(Add(sequence))
        steps = 0
        while local.engine.step():
            steps += 1
        local.scheduler.check_integrity()
        assert local.runner.blocks.usage_ratio == 0
        local.metrics.flush()
    finally:
        exchange.close()
    return Served(
        {sequence.key[1]: sequence.output_ids for sequence in sequences},
        _expert_tokens(gang, rank),
        exchange.rows_sent,
        exchange.bytes_sent,
        exchange.bytes_received,
        steps,
        local.scheduler.num_preemptions,
    )


def _expert_tokens(gang: str, rank: int) -> dict[tuple[int, int], int]:
    """As the metrics have them, which is what operators see."""
    return {
        (int(sample.labels["layer"]), int(sample.labels["expert"])): int(sample.value)
        for metric in REGISTRY.collect()
        if metric.name == "caravan_expert_tokens"
        for sample in metric.samples
        if sample.name.endswith("_total") and sample.labels["gang"] == gang and sample.labels["rank"] == str(rank)
    }
