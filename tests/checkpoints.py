"""Small Llama 4 checkpoints of random weights, written by the reference implementation itself."""

from pathlib import Path
from typing import Any

import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

MAVERICK: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 1,
    "num_local_experts": 128,
    "interleave_moe_layer_step": 2,
    "use_qk_norm": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    # No multiple of any block size in use.
    "attention_chunk_size": 37,
    "floor_scale": 50,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SCOUT: dict[str, Any] = {
    **MAVERICK,
    "num_local_experts": 16,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 128,
    },
}


def reference(overrides: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> Llama4ForCausalLM:
    """A reference model of random weights, scaled so that activations neither vanish nor explode."""
    config = Llama4TextConfig(**overrides)
    torch.manual_seed(seed)
    model = Llama4ForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                fan_in = parameter.shape[-2] if "experts" in name else parameter.shape[-1]
                torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else fan_in**-0.5)
    return model


def write(folder: Path, overrides: dict[str, Any], seed: int = 0, **save: Any) -> Llama4ForCausalLM:
    """Write the checkpoint and return the reference model it holds."""
    model = reference(overrides, seed)
    model.save_pretrained(folder, **save)
    return model
