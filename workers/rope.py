"""Rotary position embedding in the interleaved complex form the Llama 4 checkpoints are stored for."""

import math

import torch
from torch import Tensor

from workers.model_config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angular frequencies, radians a token: [head_dim / 2] float32.

    Formula: theta^(-2i/head_dim), scaled as Llama 3.1 does where the configuration asks for it
    (`transformers.modeling_rope_utils._compute_llama3_parameters`).
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponent)
    if config.rope_scaling is None:
        return frequencies
    return _llama3(frequencies, config.rope_scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    wavelength = 2 * math.pi / frequencies
    longest_kept = scaling.original_max_position_embeddings / scaling.high_freq_factor
    shortest_scaled = scaling.original_max_position_embeddings / scaling.low_freq_factor
    scaled = torch.where(wavelength > shortest_scaled, frequencies / scaling.factor, frequencies)
    if shortest_scaled <= longest_kept:
        # low == high (Scout): the band between them is empty, and its formula would divide by zero.
        return scaled
    smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    between = (wavelength <= shortest_scaled) & (wavelength >= longest_kept)
    return torch.where(between, blended, scaled)


def rotations(positions_T: Tensor, frequencies: Tensor) -> Tensor:
    """Unit complex rotations of each position: [T, 1, head_dim / 2] complex64."""
    angles = positions_T.to(torch.float32)[:, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)[:, None, :]


def rotate(x_THD: Tensor, rotations_T1C: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last dimension, in float32; returns [T, H, D] float32."""
    pairs = torch.view_as_complex(x_THD.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations_T1C).flatten(-2)
