"""A rank's weights: everything but the routed experts, and of those the ones its expert map names."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workers.checkpoint import Checkpoint
from workers.expert_map import ExpertMap
from workers.model_config import ModelConfig


@dataclass
class MlpWeights:
    """A SwiGLU block: gate and up in one matrix, gate first."""

    gate_up: Tensor
    """[2 · inner, hidden]."""
    down: Tensor
    """[hidden, inner]."""


@dataclass
class ExpertWeights:
    """The routed experts of one MoE layer that this rank holds, as rows ([out, in]) for products of few tokens."""

    experts: list[int]
    """Logical numbers, ascending."""
    slots: list[int]
    """Where each of them lies in `gate_up` and `down`."""
    gate_up: Tensor
    """[slots, 2 · inner, hidden]."""
    down: Tensor
    """[slots, hidden, inner]."""

    def holding(self, experts: list[int]) -> "ExpertWeights":
        """With a place for each of `experts`; what is held of them already stays in its own."""
        slot_of = {expert: slot for expert, slot in zip(self.experts, self.slots, strict=True) if expert in experts}
        free = sorted(set(range(len(self.down))) - set(slot_of.values()))
        more = len(experts) - len(slot_of) - len(free)
        gate_up, down = (
            torch.cat([tensor, tensor.new_empty(more, *tensor.shape[1:])]) if more > 0 else tensor
            for tensor in (self.gate_up, self.down)
        )
        places = iter([*free, *range(len(self.down), len(down))])
        slots = [slot_of[expert] if expert in slot_of else next(places) for expert in experts]
        return ExpertWeights(experts, slots, gate_up, down)


@dataclass
class MoeWeights:
    router: Tensor
    """The expert router, [experts, hidden]."""
    shared: MlpWeights
    routed: ExpertWeights


@dataclass
class AttentionWeights:
    qkv: Tensor
    """[(heads + 2 · kv heads) · head dim, hidden]: q, k, v."""
    qkv_bias: Tensor | None
    out: Tensor
    """[hidden, heads · head dim]."""
    out_bias: Tensor | None


@dataclass
class LayerWeights:
    attention_norm: Tensor
    attention: AttentionWeights
    mlp_norm: Tensor
    mlp: MlpWeights | MoeWeights


@dataclass
class ModelWeights:
    embedding: Tensor
    """[vocabulary, hidden]."""
    layers: list[LayerWeights]
    norm: Tensor
    head: Tensor
    """[vocabulary, hidden]."""


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    expert_map: ExpertMap,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ModelWeights:
    """Read what `rank` needs; `progress(bytes read, bytes in all)` is called after every layer.

    Raises:
        UserError: a tensor is missing, truncated or of another shape than the configuration says.
    """
    return _Loader(checkpoint, config, expert_map, rank, dtype, device, progress).load()


def gain_experts(
    weights: ModelWeights, checkpoint: Callable[[], Checkpoint], config: ModelConfig, expert_map: ExpertMap, rank: int
) -> ModelWeights:
    """The weights for another map. Everything stays where it lies; experts that `rank` gains are read, into the places
    of those it lost, and into new ones where these are too few. `weights` is of no use any more.

    Raises:
        UserError: as `load_weights`.
    """
    tensor = weights.embedding
    loader: _Loader | None = None
    layers = list(weights.layers)
    for index, number in enumerate(config.moe_layers):
        mlp = layers[number].mlp
        assert isinstance(mlp, MoeWeights)
        held = expert_map.experts_of(index, rank)
        routed = mlp.routed.holding(held)
        if gained := sorted(set(held) - set(mlp.routed.experts)):
            loader = loader or _Loader(checkpoint(), config, expert_map, rank, tensor.dtype, tensor.device)
            loader.read_experts(f"model.layers.{number}.feed_forward.", routed, gained)
        layers[number] = replace(layers[number], mlp=replace(mlp, routed=routed))
    return replace(weights, layers=layers)


@dataclass
class _Loader:
    checkpoint: Checkpoint
    config: ModelConfig
    expert_map: ExpertMap
    rank: int
    dtype: torch.dtype
    device: torch.device
    progress: Callable[[int, int], None] = lambda done, total: None

    def load(self) -> ModelWeights:
        c = self.config
        total = self._bytes_needed()
        embedding = self._get("model.embed_tokens.weight", c.vocab_size, c.hidden_size)
        layers = []
        for layer in range(c.num_layers):
            layers.append(self._layer(layer))
            self.progress(self.checkpoint.bytes_read, total)
        head = embedding if c.tie_word_embeddings else self._get("lm_head.weight", c.vocab_size, c.hidden_size)
        weights = ModelWeights(embedding, layers, self._get("model.norm.weight", c.hidden_size), head)
        self.progress(self.checkpoint.bytes_read, total)
        return weights

    def _get(self, name: str, *shape: int) -> Tensor:
        return self.checkpoint.tensor(name, shape, self.dtype).to(self.device)

    def _layer(self, layer: int) -> LayerWeights:
        c, prefix = self.config, f"model.layers.{layer}."
        mlp: MlpWeights | MoeWeights
        if layer in c.moe_layers:
            mlp = self._moe(prefix + "feed_forward.", c.moe_layers.index(layer))
        else:
            mlp = self._mlp(prefix + "feed_forward.", c.dense_mlp_size)
        return LayerWeights(
            attention_norm=self._get(prefix + "input_layernorm.weight", c.hidden_size),
            attention=self._attention(prefix + "self_attn."),
            mlp_norm=self._get(prefix + "post_attention_layernorm.weight", c.hidden_size),
            mlp=mlp,
        )

    def _attention(self, prefix: str) -> AttentionWeights:
        c = self.config
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        sizes = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        qkv = torch.cat([self._get(f"{prefix}{name}.weight", size, c.hidden_size) for name, size in sizes.items()])
        out = self._get(prefix + "o_proj.weight", c.hidden_size, q_size)
        if not c.attention_bias:
            return AttentionWeights(qkv, None, out, None)
        bias = torch.cat([self._get(f"{prefix}{name}.bias", size) for name, size in sizes.items()])
        return AttentionWeights(qkv, bias, out, self._get(prefix + "o_proj.bias", c.hidden_size))

    def _mlp(self, prefix: str, inner: int) -> MlpWeights:
        hidden = self.config.hidden_size
        gate_up = torch.cat([self._get(f"{prefix}{name}.weight", inner, hidden) for name in ("gate_proj", "up_proj")])
        return MlpWeights(gate_up, self._get(prefix + "down_proj.weight", hidden, inner))

    def _moe(self, prefix: str, moe_layer: int) -> MoeWeights:
        c = self.config
        experts, hidden, inner = c.num_experts, c.hidden_size, c.expert_mlp_size
        held = self.expert_map.experts_of(moe_layer, self.rank)
        routed = ExpertWeights(
            held,
            list(range(len(held))),
            torch.empty(len(held), 2 * inner, hidden, dtype=self.dtype, device=self.device),
            torch.empty(len(held), hidden, inner, dtype=self.dtype, device=self.device),
        )
        self.read_experts(prefix, routed, held)
        return MoeWeights(
            router=self._get(prefix + "router.weight", experts, hidden),
            shared=self._mlp(prefix + "shared_expert.", inner),
            routed=routed,
        )

    def read_experts(self, prefix: str, routed: ExpertWeights, experts: list[int]) -> None:
        """Into their places; `experts` are of those held."""
        c = self.config
        slot_of = dict(zip(routed.experts, routed.slots, strict=True))
        for expert in experts:
            # Stored to be applied as x @ W, [in, out]; kept as [out, in], whose rows are read in one run.
            for out, name, shape in (
                (routed.gate_up, "gate_up_proj", (c.num_experts, c.hidden_size, 2 * c.expert_mlp_size)),
                (routed.down, "down_proj", (c.num_experts, c.expert_mlp_size, c.hidden_size)),
            ):
                out[slot_of[expert]] = self.checkpoint.expert(f"{prefix}experts.{name}", expert, shape, self.dtype).t()

    def _bytes_needed(self) -> int:
        c = self.config
        expert_numel = 3 * c.hidden_size * c.expert_mlp_size
        dense_numel = 3 * c.hidden_size * c.dense_mlp_size
        attention = 2 * c.hidden_size * (c.num_heads + c.num_kv_heads) * c.head_dim
        moe = sum(
            expert_numel * (1 + len(self.expert_map.experts_of(index, self.rank))) + c.num_experts * c.hidden_size
            for index in range(c.num_moe_layers)
        )
        embeddings = (1 if c.tie_word_embeddings else 2) * c.vocab_size * c.hidden_size
        norms = (2 * c.num_layers + 1) * c.hidden_size
        biases = c.num_layers * ((c.num_heads + 2 * c.num_kv_heads) * c.head_dim + c.hidden_size) * c.attention_bias
        dense = dense_numel * (c.num_layers - c.num_moe_layers)
        numel = moe + dense + attention * c.num_layers + embeddings + norms + biases
        return numel * self.checkpoint.item_bytes("model.embed_tokens.weight")
