"""What a packed file holds: every tensor as a rank reads it, and which of the checkpoint's tensors it is made of.

No torch here: the command line reads it too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from workers.expert_map import ExpertMap
from workers.model_config import ModelConfig

LAYOUT_VERSION = 1
"""Part of a pack's name: grows with every change of what a pack holds, or of how."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Source:
    """One of the checkpoint's tensors, by its Hugging Face name."""

    name: str
    shape: tuple[int, ...]
    is_turned: bool = False
    """[experts, in, out] in the checkpoint, [experts, out, in] in the pack."""


@dataclass(frozen=True)
class PackedTensor:
    """A tensor of the pack: its sources one after the other along the first dimension."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    moe_layer: int = -1
    """Of routed experts, the MoE layer's number among MoE layers; their first dimension is the logical expert."""

    @property
    def numel(self) -> int:
        return prod(self.shape)


def packed_tensors(model: ModelConfig) -> list[PackedTensor]:
    """All tensors of a pack in the order they lie in it."""
    return list(_tensors(model))


def held_numel(tensors: list[PackedTensor], expert_map: ExpertMap, rank: int) -> int:
    """Elements that `rank` reads: all but the routed experts, and of those its own."""
    total = 0
    for tensor in tensors:
        if tensor.moe_layer < 0:
            total += tensor.numel
        else:
            held = len(expert_map.experts_of(tensor.moe_layer, rank))
            total += tensor.numel // tensor.shape[0] * held
    return total


def _tensors(model: ModelConfig) -> Iterator[PackedTensor]:
    hidden, head_dim = model.hidden_size, model.head_dim
    q_size, kv_size = model.num_heads * head_dim, model.num_kv_heads * head_dim
    yield _one("embedding", "model.embed_tokens.weight", model.vocab_size, hidden)
    for layer in range(model.num_layers):
        prefix, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        yield _one(prefix + "attention_norm", theirs + "input_layernorm.weight", hidden)
        yield _one(prefix + "mlp_norm", theirs + "post_attention_layernorm.weight", hidden)
        sizes = (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size))
        attention = theirs + "self_attn."
        yield _joined(prefix + "qkv", [Source(f"{attention}{name}.weight", (size, hidden)) for name, size in sizes])
        yield _one(prefix + "out", attention + "o_proj.weight", hidden, q_size)
        if model.attention_bias:
            yield _joined(prefix + "qkv_bias", [Source(f"{attention}{name}.bias", (size,)) for name, size in sizes])
            yield _one(prefix + "out_bias", attention + "o_proj.bias", hidden)
        mlp = theirs + "feed_forward."
        if layer not in model.moe_layers:
            yield from _mlp(prefix, mlp, hidden, model.dense_mlp_size)
            continue
        experts, inner = model.num_experts, model.expert_mlp_size
        yield _one(prefix + "router", mlp + "router.weight", experts, hidden)
        yield from _mlp(prefix + "shared.", mlp + "shared_expert.", hidden, inner)
        number = model.moe_layers.index(layer)
        yield _experts(prefix + "experts.gate_up", mlp + "experts.gate_up_proj", (experts, hidden, 2 * inner), number)
        yield _experts(prefix + "experts.down", mlp + "experts.down_proj", (experts, inner, hidden), number)
    yield _one("norm", "model.norm.weight", hidden)
    if not model.tie_word_embeddings:
        yield _one("head", "lm_head.weight", model.vocab_size, hidden)


def _mlp(prefix: str, theirs: str, hidden: int, inner: int) -> Iterator[PackedTensor]:
    halves = [Source(f"{theirs}{name}.weight", (inner, hidden)) for name in ("gate_proj", "up_proj")]
    yield _joined(prefix + "gate_up", halves)
    yield _one(prefix + "down", theirs + "down_proj.weight", hidden, inner)


def _one(name: str, theirs: str, *shape: int) -> PackedTensor:
    return PackedTensor(name, shape, (Source(theirs, shape),))


def _joined(name: str, sources: list[Source]) -> PackedTensor:
    rows = sum(source.shape[0] for source in sources)
    return PackedTensor(name, (rows, *sources[0].shape[1:]), tuple(sources))


def _experts(name: str, theirs: str, stored: tuple[int, int, int], moe_layer: int) -> PackedTensor:
    experts, rows, columns = stored
    return PackedTensor(name, (experts, columns, rows), (Source(theirs, stored, is_turned=True),), moe_layer)
