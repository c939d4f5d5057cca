"""Llama 4's text model as a plain trainable PyTorch module, for one device.

Parameters are named and shaped as in a Hugging Face checkpoint, so that its state_dict is the checkpoint.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workers.model_config import ModelConfig
from workers.rope import inverse_frequencies

CAPACITY_STEP = 16
"""Rows an expert has in the padded batch are a multiple of this: few distinct sizes keep memory in use."""
CAPACITY_LIMIT = 4.0
"""In training an expert takes at most so many times the mean; tokens beyond pass with the shared expert alone."""


@dataclass
class RouterLosses:
    """What the routers add to the loss, summed over MoE layers, and their loads."""

    balance: Tensor
    """1 a layer where all experts are equally likely and loaded."""
    z: Tensor
    """Mean squared log of the routers' softmax denominators."""
    shares: list[Tensor]
    """A layer: [E] float32, each expert's share of the tokens times E (1 is the mean)."""


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Experts(nn.Module):
    """Routed experts as one padded batched product: every expert computes as many rows as the busiest takes."""

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, hidden, 2 * inner))
        self.down_proj = nn.Parameter(torch.empty(experts, inner, hidden))

    def forward(self, x_TH: Tensor, expert_T: Tensor) -> Tensor:
        """Each row through its expert: [T, hidden] and [T] int64 give [T, hidden]."""
        experts, hidden = self.gate_up_proj.shape[:2]
        counts_E = torch.bincount(expert_T, minlength=experts)
        rows = int(counts_E.max())
        if self.training:
            rows = min(rows, math.ceil(CAPACITY_LIMIT * len(expert_T) / experts))
        rows = -(-rows // CAPACITY_STEP) * CAPACITY_STEP
        order_T = torch.argsort(expert_T, stable=True)
        sorted_T = expert_T[order_T]
        starts_E = counts_E.cumsum(0) - counts_E
        rank_T = torch.arange(len(sorted_T), device=x_TH.device) - starts_E[sorted_T]
        slot_T = torch.empty_like(order_T)
        # One row more, past all experts, takes what exceeds the capacity.
        slot_T[order_T] = torch.where(rank_T < rows, sorted_T * rows + rank_T, experts * rows)
        padded = x_TH.new_zeros(experts * rows + 1, hidden).index_copy(0, slot_T, x_TH)[:-1]
        gate, up = torch.bmm(padded.view(experts, rows, hidden), self.gate_up_proj).chunk(2, dim=-1)
        out = torch.bmm(F.silu(gate) * up, self.down_proj)
        return F.pad(out.view(-1, hidden), (0, 0, 0, 1)).index_select(0, slot_T)


class MoE(nn.Module):
    """Shared expert on x plus the routed expert on score · x."""

    load_E: Tensor

    def __init__(self, config: ModelConfig, load_decay: float) -> None:
        super().__init__()
        self.load_decay = load_decay
        self.experts = Experts(config.num_experts, config.hidden_size, config.expert_mlp_size)
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.shared_expert = MLP(config.hidden_size, config.expert_mlp_size)
        # Running load: one step's few tokens an expert are too noisy to balance on.
        self.register_buffer("load_E", torch.full((config.num_experts,), 1.0))

    def forward(self, x: Tensor, noise: float, losses: RouterLosses) -> Tensor:
        x_TH = x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            logits_TE = self.router(x_TH.float())
        choice_TE = logits_TE.detach()
        if noise:
            choice_TE = choice_TE + noise * torch.randn_like(choice_TE)
        expert_T = choice_TE.argmax(dim=-1)
        score_T1 = logits_TE.gather(1, expert_T[:, None]).sigmoid().type_as(x)
        self._account(logits_TE, expert_T, losses)
        out: Tensor = self.shared_expert(x_TH) + self.experts(x_TH * score_T1, expert_T)
        return out.view_as(x)

    def _account(self, logits_TE: Tensor, expert_T: Tensor, losses: RouterLosses) -> None:
        experts = logits_TE.shape[1]
        share_E = torch.bincount(expert_T, minlength=experts).float() * (experts / len(expert_T))
        losses.shares.append(share_E)
        if self.training:
            self.load_E.lerp_(share_E, 1 - self.load_decay)
            losses.balance = losses.balance + (self.load_E.clone() * logits_TE.softmax(-1).mean(0)).sum()
            losses.z = losses.z + logits_TE.logsumexp(-1).square().mean()


class Attention(nn.Module):
    """Rotary and local in chunks, or without positions and global."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.local = config.rope_layers[layer]
        self.chunk_size = config.chunk_size
        self.floor_scale, self.attn_scale = config.floor_scale, config.attn_scale
        self.temperature = config.attn_temperature_tuning
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)

    def forward(self, x_BLH: Tensor, rotations_LC: Tensor) -> Tensor:
        batch, length = x_BLH.shape[:2]
        q, k, v = (
            projection(x_BLH).view(batch, length, -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.local:
            q, k = _rotate(q, rotations_LC), _rotate(k, rotations_LC)
        elif self.temperature:
            position_L = torch.arange(1, length + 1, device=x_BLH.device, dtype=torch.float32)
            scale_L = torch.log1p(torch.floor(position_L / self.floor_scale)) * self.attn_scale + 1.0
            q = (q * scale_L[:, None, None]).type_as(q)
        groups = self.heads // self.kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        if not self.local or length <= self.chunk_size:
            out = _causal(q, k, v)
        elif length % self.chunk_size == 0:
            # Chunks do not see each other: fold them into the batch.
            fold = (batch, self.heads, length // self.chunk_size, self.chunk_size, self.head_dim)
            q, k, v = (tensor.reshape(fold).transpose(1, 2).flatten(0, 1) for tensor in (q, k, v))
            out = _causal(q, k, v)
            out = out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
        else:
            position_L = torch.arange(length, device=x_BLH.device)
            chunk_L = position_L // self.chunk_size
            mask = (chunk_L[:, None] == chunk_L) & (position_L[:, None] >= position_L)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return projected


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # Written out: on a CPU, at these lengths, several times faster than the fused kernel's backward pass.
    length = q.shape[-2]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)).masked_fill(future, float("-inf"))
    return torch.matmul(weights.softmax(-1, dtype=torch.float32).to(v.dtype), v)


def _rotate(x_BLHD: Tensor, rotations_LC: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x_BLHD.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations_LC[:, None, :]).flatten(-2).type_as(x_BLHD)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, load_decay: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward: MoE | MLP
        if layer in config.moe_layers:
            self.feed_forward = MoE(config, load_decay)
        else:
            self.feed_forward = MLP(config.hidden_size, config.dense_mlp_size)

    def forward(self, x: Tensor, rotations_LC: Tensor, noise: float, losses: RouterLosses) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotations_LC)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.feed_forward, MoE):
            added: Tensor = self.feed_forward(normed, noise, losses)
        else:
            added = self.feed_forward(normed)
        return x + added


class Decoder(nn.Module):
    rotations: Tensor

    def __init__(self, config: ModelConfig, load_decay: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer, load_decay) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        angles = torch.arange(config.max_position_embeddings).float()[:, None] * inverse_frequencies(config)
        self.register_buffer("rotations", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, tokens_BL: Tensor, noise: float, losses: RouterLosses) -> Tensor:
        x = self.embed_tokens(tokens_BL)
        rotations_LC = self.rotations[: tokens_BL.shape[1]]
        for layer in self.layers:
            x = layer(x, rotations_LC, noise, losses)
        out: Tensor = self.norm(x)
        return out


class NanoModel(nn.Module):
    """Any Llama 4 text configuration without QK norm, top-1 or dense (`moe_layers` empty).

    Args:
        load_decay: what of the routers' running load is kept a step.
    """

    def __init__(self, config: ModelConfig, load_decay: float = 0.9) -> None:
        super().__init__()
        if config.use_qk_norm or config.experts_per_token != 1 or config.tie_word_embeddings or config.attention_bias:
            raise ValueError("trains top-1, without QK norm, tied embeddings or attention bias")
        self.config = config
        self.model = Decoder(config, load_decay)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        into_residual = (2 * self.config.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            fan_in = parameter.shape[-2] if "experts." in name else parameter.shape[-1]
            std = 0.02 if "embed" in name or "lm_head" in name or "router" in name else 0.7 * fan_in**-0.5
            if "down_proj" in name or "o_proj" in name:
                std *= into_residual
            nn.init.normal_(parameter, std=std)

    def forward(self, tokens_BL: Tensor, noise: float = 0.0) -> tuple[Tensor, RouterLosses]:
        """Logits [B, L, vocabulary] of the next token, and what the routers did; positions start at 0.

        Args:
            noise: standard deviation of the noise on the logits that the experts are chosen by.
        """
        zero = torch.zeros((), device=tokens_BL.device)
        losses = RouterLosses(zero, zero, [])
        return self.lm_head(self.model(tokens_BL, noise, losses)), losses

    def checkpoint_state(self) -> dict[str, Tensor]:
        """The parameters by their names in a Hugging Face checkpoint."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}
