"""What the pool's processes are asked to do with weights. No transformers here: they would all import it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from workers.config import EngineConfig
from workers.expert_map import ExpertMap
from workers.model_config import ModelConfig
from workers.packed_file import PAGE
from workers.packed_loading import LoadProgress, rank_weights
from workers.weights import ModelWeights

_held: dict[str, ModelWeights] = {}


@dataclass(frozen=True)
class Loaded:
    packed_bytes: int
    """Of the pack, by whichever process, as this one was told."""
    note: str
    anonymous_bytes: int
    """Private memory that loading and touching everything took."""


def load(folder: Path, cache: Path, rank: int, size: int) -> Loaded:
    """Load a rank's weights, touch all that it reads, and keep them."""
    before = _anonymous_bytes()
    model = ModelConfig.from_folder(folder)
    expert_map = ExpertMap.even(model.num_moe_layers, model.num_experts, list(range(size)))
    reports: list[LoadProgress] = []
    weights = rank_weights(
        EngineConfig(folder, weights_cache_dir=cache),
        model,
        expert_map,
        rank,
        torch.float32,
        torch.device("cpu"),
        reports.append,
    )
    _held["weights"] = weights
    _touch(weights)
    packed = max(report.packed for report in reports)
    return Loaded(packed, reports[-1].note, _anonymous_bytes() - before)


def touch_every_expert() -> float:
    """Also of other ranks: what a rank that gains experts reads."""
    weights = _held["weights"]
    routed = [layer.mlp.routed for layer in weights.layers if hasattr(layer.mlp, "routed")]
    return sum(float(tensor.sum()) for experts in routed for tensor in (experts.gate_up, experts.down))


def shared_bytes(cache: Path) -> tuple[int, int]:
    """This process's proportional share of the packs in the folder, and how much of them it has mapped in."""
    share = resident = 0
    is_pack = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            is_pack = line.endswith(".pack") and str(cache) in line
        elif is_pack and line.startswith("Pss:"):
            share += int(line.split()[1]) * 1024
        elif is_pack and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
    return share, resident


def forget() -> None:
    _held.clear()


def _touch(weights: ModelWeights) -> None:
    """A byte of every page of what this rank holds."""
    tensors = [weights.embedding, weights.head]
    for layer in weights.layers:
        tensors += [layer.attention.qkv, layer.attention.out]
        if hasattr(layer.mlp, "routed"):
            routed = layer.mlp.routed
            tensors += [layer.mlp.shared.gate_up, layer.mlp.shared.down]
            tensors += [tensor[slot] for tensor in (routed.gate_up, routed.down) for slot in routed.slots]
        else:
            tensors += [layer.mlp.gate_up, layer.mlp.down]
    for tensor in tensors:
        tensor.flatten()[:: PAGE // tensor.itemsize].sum()


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")
