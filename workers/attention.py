"""Paged attention of one layer.

Shape suffixes: T rows of the step, B segments of one query row, n and m queries and keys of a longer one,
H query heads, K kv heads, G query heads a kv head, D head dimension, L padded keys, X hidden size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.layers import l2_norm
from workers.model_config import ModelConfig
from workers.rope import rotate
from workers.step_inputs import AttentionInputs, LongSegment
from workers.weights import AttentionWeights


@dataclass(frozen=True)
class PositionTensors:
    """What depends on positions alone, computed once a step."""

    rotations_T1C: Tensor
    """RoPE layers: complex rotations."""
    temperature_T11: Tensor | None
    """NoPE layers: what multiplies the query, float32; None where the model has no temperature."""


class Attention:
    """RoPE and chunked (local), or NoPE with temperature and full (global). Source: `Llama4TextAttention`."""

    def __init__(
        self, config: ModelConfig, layer: int, weights: AttentionWeights, cache: tuple[Tensor, Tensor]
    ) -> None:
        self._config, self._weights = config, weights
        self._keys, self._values = cache
        self.is_local = config.rope_layers[layer]

    def __call__(self, x_TX: Tensor, positions: PositionTensors, inputs: AttentionInputs) -> Tensor:
        c = self._config
        qkv = F.linear(x_TX, self._weights.qkv, self._weights.qkv_bias).unflatten(-1, (-1, c.head_dim))
        q_THD, k_TKD, v_TKD = qkv.split([c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        if self.is_local:
            q_THD = rotate(q_THD, positions.rotations_T1C).to(x_TX.dtype)
            k_TKD = rotate(k_TKD, positions.rotations_T1C).to(x_TX.dtype)
            if c.use_qk_norm:
                q_THD, k_TKD = l2_norm(q_THD, c.rms_norm_eps), l2_norm(k_TKD, c.rms_norm_eps)
        elif positions.temperature_T11 is not None:
            q_THD = (q_THD * positions.temperature_T11).to(x_TX.dtype)
        # Stored before anything is read: queries of this step see keys of this step.
        self._keys.flatten(0, 1)[inputs.slot_T] = k_TKD
        self._values.flatten(0, 1)[inputs.slot_T] = v_TKD
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        if len(inputs.single_B):
            out_THD[inputs.single_B] = self._single_rows(q_THD[inputs.single_B], inputs)
        for segment in inputs.long:
            out_THD[segment.rows] = self._long(q_THD[segment.rows], segment)
        return F.linear(out_THD.flatten(1), self._weights.out, self._weights.out_bias)

    def _single_rows(self, q_BHD: Tensor, inputs: AttentionInputs) -> Tensor:
        kv_heads = self._config.num_kv_heads
        k_BKLD, v_BKLD = (cache[inputs.blocks_BM].flatten(1, 2).transpose(1, 2) for cache in (self._keys, self._values))
        # The query heads of a kv head stand where several queries would: no key is copied for them.
        q_BKGD = q_BHD.unflatten(1, (kv_heads, -1))
        out_BKGD = F.scaled_dot_product_attention(q_BKGD, k_BKLD, v_BKLD, inputs.visible_BL[:, None, None, :])
        return out_BKGD.flatten(1, 2)

    def _long(self, q_nHD: Tensor, segment: LongSegment) -> Tensor:
        k_mKD, v_mKD = (
            cache[segment.blocks].flatten(0, 1)[segment.skip : segment.skip + segment.num_keys]
            for cache in (self._keys, self._values)
        )
        num_queries = len(q_nHD)
        mask = None
        if num_queries < segment.num_keys:
            mask = q_nHD.new_ones(num_queries, segment.num_keys, dtype=torch.bool)
            mask = mask.tril(segment.num_keys - num_queries)
        out_HnD = F.scaled_dot_product_attention(
            q_nHD.transpose(0, 1)[None],
            k_mKD.transpose(0, 1)[None],
            v_mKD.transpose(0, 1)[None],
            mask,
            is_causal=mask is None,
            enable_gqa=True,
        )[0]
        return out_HnD.transpose(0, 1)


def temperature(position_T: Tensor, config: ModelConfig) -> Tensor | None:
    """log1p(floor((position + 1) / floor_scale)) · attn_scale + 1: [T, 1, 1] float32 (arXiv 2501.19399)."""
    if not config.attn_temperature_tuning:
        return None
    steps = torch.floor((position_T.float() + 1.0) / config.floor_scale)
    return (torch.log1p(steps) * config.attn_scale + 1.0)[:, None, None]
