"""What ranks and hosts of a plan hold in memory, in bytes, from the model's shape alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from cluster.placement import Plan
from workers.checkpoint_check import checkpoint_files
from workers.config import EngineConfig
from workers.expert_map import ExpertMap
from workers.model_config import ModelConfig
from workers.packed_layout import ITEM_BYTES, held_numel, packed_tensors


@dataclass(frozen=True)
class RankFootprint:
    """Of one rank."""

    experts: str
    """Logical experts of each MoE layer, as in "0-31, 40"."""
    weights_bytes: int
    """It maps, or has in memory of its own."""
    kv_bytes: int
    """Of its KV pools."""


@dataclass(frozen=True)
class HostFootprint:
    """Of one host's ranks together."""

    weights_bytes: int
    """What ranks share counts once."""
    kv_bytes: int


class Footprint:
    """Of a gang.

    Args:
        plan: where its ranks are; on GPUs, if they claim any.
    """

    def __init__(self, model: ModelConfig, engine: EngineConfig, plan: Plan, expert_map: ExpertMap) -> None:
        self._engine, self._plan, self._map = engine, plan, expert_map
        self.dtype = model.dtype if engine.dtype == "auto" else engine.dtype
        self.is_shared = engine.share_weights and not plan.request.gpus
        """Ranks of a host map one packed copy of the checkpoint."""
        self._item_bytes = ITEM_BYTES[self.dtype]
        self._tensors = packed_tensors(model)

    @property
    def pack_bytes(self) -> int:
        """Of the whole checkpoint as a host packs it on its disk."""
        return sum(tensor.numel for tensor in self._tensors) * self._item_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """Of the checkpoint's files.

        Raises:
            UserError: there are none.
        """
        return sum(path.stat().st_size for path in checkpoint_files(self._engine.model_dir))

    def rank(self, rank: int) -> RankFootprint:
        """Of one rank."""
        layers = {runs(self._map.experts_of(layer, rank)) for layer in range(len(self._map.replicas))}
        return RankFootprint(
            experts=layers.pop() if len(layers) == 1 else "differ by layer" if layers else "none",
            weights_bytes=held_numel(self._tensors, self._map, rank) * self._item_bytes,
            kv_bytes=self._engine.kv_memory_bytes,
        )

    def host(self, address: str) -> HostFootprint:
        """Of the ranks on one host."""
        ranks = self._plan.ranks_by_host[address]
        each = [self.rank(rank) for rank in ranks]
        kv_bytes = sum(one.kv_bytes for one in each)
        if not self.is_shared:
            return HostFootprint(sum(one.weights_bytes for one in each), kv_bytes)
        numel = 0
        for tensor in self._tensors:
            if tensor.moe_layer < 0:
                numel += tensor.numel
            else:
                held = {expert for rank in ranks for expert in self._map.experts_of(tensor.moe_layer, rank)}
                numel += tensor.numel // tensor.shape[0] * len(held)
        return HostFootprint(numel * self._item_bytes, kv_bytes)


def runs(numbers: Iterable[int]) -> str:
    """Ascending numbers as a person writes them: "0-31, 40"."""
    parts = []
    for _, pairs in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in pairs]
        parts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return ", ".join(parts)
