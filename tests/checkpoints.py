"""Small Llama 4 checkpoints of random weights, written by the reference implementation itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
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
# The announced shape has 16 experts; the rest is unpublished.
BEHEMOTH: dict[str, Any] = {
    **MAVERICK,
    "num_hidden_layers": 6,
    "num_local_experts": 16,
    "intermediate_size": 96,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
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
            else:
                # Norms and biases: anything but the ones and zeros they start as.
                torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    return model


def write(
    folder: Path,
    overrides: dict[str, Any],
    seed: int = 0,
    edit: Callable[[Llama4ForCausalLM], None] | None = None,
    **save: Any,
) -> Llama4ForCausalLM:
    """Write the checkpoint, after `edit` has had its way, and return the reference model it holds."""
    model = reference(overrides, seed)
    if edit is not None:
        edit(model)
    model.save_pretrained(folder, **save)
    return model


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Change config.json in place, or replace it with what `edit` returns."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw = edit(raw) or raw
    path.write_text(json.dumps(raw))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]) -> None:
    """Change the tensors of a checkpoint of one file in place, or replace them with what `edit` returns."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors = edit(tensors) or tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def published(raw: dict[str, Any]) -> dict[str, Any]:
    """A text configuration as the published checkpoints have it: nested, with rope_theta and rope_scaling apart."""
    text = {**raw, "model_type": "llama4_text"}
    rope = dict(text.pop("rope_parameters"))
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    # Lists that transformers has filled in are empty or absent there.
    text["no_rope_layers"] = []
    for name in ("layer_types", "moe_layers", "dtype", "architectures"):
        text.pop(name, None)
    text["attn_temperature_tuning"] = 4
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "torch_dtype": raw.get("dtype", "float32"),
        "text_config": text,
        "vision_config": {"model_type": "llama4_vision_model", "hidden_size": 1408, "num_hidden_layers": 34},
    }


def one_expert(
    model: Llama4ForCausalLM, always: Callable[[int], int | None], never: Callable[[int], int | None]
) -> None:
    """Bend the expert routers, given a layer's number: every token chooses expert `always(layer)`, none chooses
    `never(layer)`; None bends nothing.

    The first hidden dimension becomes a large constant, which the routers' rows then weigh.
    """
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 12.0
        for number, layer in enumerate(model.model.layers):
            if not layer.is_moe_layer:
                continue
            layer.post_attention_layernorm.weight[0] = 1.0
            router = layer.feed_forward.router.weight
            router[:, 0] = 0
            if (expert := always(number)) is not None:
                router[expert, 0] = 20.0
            if (expert := never(number)) is not None:
                router[expert, 0] = -20.0
