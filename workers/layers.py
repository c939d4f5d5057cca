"""The small functions every layer shares."""

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.weights import MlpWeights


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root mean square norm: computed in float32, cast to the input's type, then multiplied by the weight."""
    return l2_norm(x_TD, eps) * weight_D


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """x · rsqrt(mean(x²) + eps) over the last dimension, in float32; returns the input's type."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def swiglu(x_TD: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x)) · up(x)); `gate_up` is [2 · inner, D], gate first, `down` is [D, inner]."""
    gate, up = F.linear(x_TD, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def mlp(x_TD: Tensor, weights: MlpWeights) -> Tensor:
    return swiglu(x_TD, weights.gate_up, weights.down)
