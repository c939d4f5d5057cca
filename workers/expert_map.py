"""Which ranks hold which experts: data, never arithmetic on rank numbers. No torch here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from protos import gang_pb2


@dataclass(frozen=True)
class ExpertMap:
    """`replicas[layer][expert]` are the ranks that hold a replica of a logical expert, one entry a MoE layer.

    Every expert of every layer has at least one replica (coverage): a token whose only expert were missing would
    silently get the shared expert alone.

    Raises:
        ValueError: an expert without a replica, a rank named twice for one expert, layers of unequal size.
    """

    replicas: tuple[tuple[tuple[int, ...], ...], ...]

    def __post_init__(self) -> None:
        for layer, experts in enumerate(self.replicas):
            if len(experts) != len(self.replicas[0]):
                raise ValueError(f"MoE layer {layer} maps {len(experts)} experts, layer 0 {len(self.replicas[0])}")
            for expert, ranks in enumerate(experts):
                if not ranks:
                    raise ValueError(f"MoE layer {layer}: expert {expert} has no replica")
                if len(set(ranks)) != len(ranks):
                    raise ValueError(f"MoE layer {layer}: expert {expert} names a rank twice: {ranks}")

    @classmethod
    def even(cls, num_layers: int, num_experts: int, ranks: Sequence[int]) -> "ExpertMap":
        """Each rank a contiguous run of experts, sizes differing by at most one, the same in every layer."""
        layer = tuple((ranks[expert * len(ranks) // num_experts],) for expert in range(num_experts))
        return cls((layer,) * num_layers)

    def experts_of(self, layer: int, rank: int) -> list[int]:
        """Logical experts of MoE layer `layer` with a replica on `rank`, ascending."""
        return [expert for expert, ranks in enumerate(self.replicas[layer]) if rank in ranks]

    def most_experts(self, rank: int) -> int:
        """The most logical experts of any one MoE layer that `rank` holds."""
        return max((len(self.experts_of(layer, rank)) for layer in range(len(self.replicas))), default=0)

    def to_proto(self) -> list[gang_pb2.LayerMap]:
        return [
            gang_pb2.LayerMap(experts=[gang_pb2.Replicas(ranks=ranks) for ranks in experts])
            for experts in self.replicas
        ]

    @classmethod
    def from_proto(cls, layers: Iterable[gang_pb2.LayerMap]) -> "ExpertMap":
        return cls(tuple(tuple(tuple(replicas.ranks) for replicas in layer.experts) for layer in layers))
