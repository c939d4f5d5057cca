"""Is a checkpoint whole? Answered from its files' headers: milliseconds, without torch, before anything starts."""

import json
from pathlib import Path
from typing import Any

from workers.errors import UserError
from workers.model_config import ModelConfig

INDEX = "model.safetensors.index.json"
PREFIX = "language_model."
# A header longer than this is no header (the format's own bound).
MAX_HEADER_BYTES = 100 * 10**6


def tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a text model by its Hugging Face name, without the prefix of multimodal checkpoints."""
    hidden, head = model.hidden_size, model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, hidden)}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (
            ("q_proj", model.num_heads * head, hidden),
            ("k_proj", model.num_kv_heads * head, hidden),
            ("v_proj", model.num_kv_heads * head, hidden),
            ("o_proj", hidden, model.num_heads * head),
        ):
            shapes[f"{prefix}self_attn.{name}.weight"] = (rows, columns)
            if model.attention_bias:
                shapes[f"{prefix}self_attn.{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
        prefix += "feed_forward."
        inner = model.dense_mlp_size
        if layer in model.moe_layers:
            experts, inner = model.num_experts, model.expert_mlp_size
            shapes[f"{prefix}router.weight"] = (experts, hidden)
            shapes[f"{prefix}experts.gate_up_proj"] = (experts, hidden, 2 * inner)
            shapes[f"{prefix}experts.down_proj"] = (experts, inner, hidden)
            prefix += "shared_expert."
        shapes[f"{prefix}gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not model.tie_word_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, hidden)
    return shapes


def check_checkpoint(folder: Path, model: ModelConfig) -> None:
    """Every file is as long as its header says, and every tensor is there in the shape of config.json.

    Raises:
        UserError: one is not; the sentence names the file and the tensor.
    """
    stored: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in checkpoint_files(folder):
        for name, entry in read_header(path).items():
            stored[name.removeprefix(PREFIX)] = path, tuple(entry["shape"])
    for name, shape in tensor_shapes(model).items():
        if name not in stored:
            raise UserError(f"{folder}: tensor {name} is missing from the checkpoint; copy it again")
        path, found = stored[name]
        if found != shape:
            raise UserError(
                f"{path}: tensor {name} has shape {list(found)}, config.json says {list(shape)}; "
                "the checkpoint and its configuration do not belong together"
            )


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint: those its index names, else all in the folder.

    Raises:
        UserError: there are none, or the index is none.
    """
    index = folder / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return [folder / name for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: is no index of safetensors files ({error!r}); copy it again") from None
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder}: holds no *.safetensors; give the folder of a Hugging Face checkpoint")
    return paths


def read_header(path: Path) -> dict[str, Any]:
    """Name to description of every tensor in a safetensors file.

    Raises:
        UserError: it is missing, truncated, or none.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"{size} bytes cannot hold its header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != size:
            raise ValueError(f"{size} bytes long where its header says {end}")
        if not all(isinstance(entry["shape"], list) for entry in header.values()):
            raise ValueError("a tensor has no shape")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though {INDEX} names it; copy the checkpoint again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: is truncated or no safetensors file ({error}); copy it again") from None
    return dict(header)
