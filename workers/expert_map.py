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

    def over(self, ranks: Sequence[int]) -> "ExpertMap":
        """The map of a gang of other members, with as few experts gained by anybody as balance allows: each of `ranks`
        keeps what it has, experts that lost their last replica go to who has the fewest, and then whoever has two more
        than another one gives some up to it. Without redundant replicas counts then differ by at most one a layer.

        Raises:
            ValueError: there are no ranks.
        """
        if not ranks:
            raise ValueError("a map needs a rank")
        return ExpertMap(tuple(_over(experts, ranks) for experts in self.replicas))

    @property
    def ranks(self) -> list[int]:
        """All that hold an expert, ascending."""
        return sorted({rank for experts in self.replicas for ranks in experts for rank in ranks})

    def check_coverage(self, ranks: Sequence[int]) -> None:
        """Raises ValueError unless every expert of every layer has a replica on one of `ranks`."""
        there = set(ranks)
        for layer, experts in enumerate(self.replicas):
            for expert, held in enumerate(experts):
                if there.isdisjoint(held):
                    raise ValueError(
                        f"MoE layer {layer}: expert {expert} is on ranks {held}, none of which is a member"
                    )

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


def _over(experts: tuple[tuple[int, ...], ...], ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    kept = [[rank for rank in held if rank in ranks] for held in experts]
    held_by: dict[int, list[int]] = {rank: [] for rank in ranks}
    for expert, held in enumerate(kept):
        for rank in held:
            held_by[rank].append(expert)

    def fewest() -> int:
        return min(ranks, key=lambda rank: (len(held_by[rank]), rank))

    def give(expert: int, rank: int) -> None:
        kept[expert].append(rank)
        held_by[rank].append(expert)

    for expert, held in enumerate(kept):
        if not held:
            give(expert, fewest())
    while True:
        poor, rich = fewest(), max(ranks, key=lambda rank: (len(held_by[rank]), -rank))
        movable = [expert for expert in held_by[rich] if poor not in kept[expert]]
        if len(held_by[rich]) - len(held_by[poor]) < 2 or not movable:
            return tuple(map(tuple, kept))
        # Of its highest numbers, so that runs of experts stay runs.
        expert = movable[-1]
        kept[expert].remove(rich)
        held_by[rich].remove(expert)
        give(expert, poor)
