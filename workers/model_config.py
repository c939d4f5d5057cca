"""Shape of a Llama 4 text model, read from a checkpoint's config.json. No torch here: the command line reads it too."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling (`rope_type: llama3`), as Scout uses it."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """A `llama4_text` configuration with every default filled in.

    Layer numbers count from 0. Sizes are numbers of elements, positions are tokens.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    expert_mlp_size: int
    """Inner size of each routed expert and of the shared expert."""
    dense_mlp_size: int
    num_experts: int
    experts_per_token: int
    moe_layers: tuple[int, ...]
    rope_layers: tuple[bool, ...]
    """A layer: True is RoPE with chunked local attention, False is NoPE with full causal attention."""
    chunk_size: int
    """Local attention's chunk; `max_position_embeddings` where the configuration names none."""
    rope_theta: float
    rope_scaling: RopeScaling | None
    use_qk_norm: bool
    attn_temperature_tuning: bool
    floor_scale: int
    attn_scale: float
    rms_norm_eps: float
    attention_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    """"float32" or "bfloat16": the checkpoint's own."""

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read `folder`/config.json (and generation_config.json for the end-of-text tokens, where there is one).

        Raises:
            UserError: no such file, not JSON, not a Llama 4 model, or a value that cannot be served.
        """
        path = folder / "config.json"
        raw = _read_json(path)
        generation = folder / "generation_config.json"
        eos = _read_json(generation).get("eos_token_id") if generation.exists() else None
        return cls.from_dict(raw, where=str(path), eos_token_id=eos)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config", eos_token_id: Any = None) -> "ModelConfig":
        """Read a parsed config.json in either dialect: `rope_parameters`, or `rope_theta` with `rope_scaling`.

        Raises:
            UserError: as `from_folder`.
        """
        model_type = raw.get("model_type")
        if model_type not in ("llama4", "llama4_text"):
            raise UserError(f"{where}: model_type is {model_type!r}; Caravan serves llama4 and llama4_text")
        text = {**raw, **raw["text_config"]} if isinstance(raw.get("text_config"), dict) else raw
        read = _Reader(text, where)
        if (activation := text.get("hidden_act", "silu")) != "silu":
            raise UserError(f"{where}: hidden_act is {activation!r}; only silu is supported")
        num_layers = read.positive("num_hidden_layers", 48)
        hidden_size = read.positive("hidden_size", 5120)
        num_heads = read.positive("num_attention_heads", 40)
        num_kv_heads = read.positive("num_key_value_heads", 8 if text.get("num_key_value_heads", 8) else num_heads)
        if num_heads % num_kv_heads:
            raise UserError(
                f"{where}: num_attention_heads ({num_heads}) is no multiple of num_key_value_heads ({num_kv_heads})"
            )
        num_experts = read.positive("num_local_experts", 16)
        experts_per_token = read.positive("num_experts_per_tok", 1)
        if experts_per_token > num_experts:
            raise UserError(
                f"{where}: num_experts_per_tok ({experts_per_token}) exceeds num_local_experts ({num_experts})"
            )
        max_position = read.positive("max_position_embeddings", 131072)
        theta, scaling = _rope(text, where)
        if eos_token_id is None:
            eos_token_id = text.get("eos_token_id")
        eos = _Reader({"eos_token_id": eos_token_id}, where).integers("eos_token_id") or []
        dtype = str(text.get("dtype") or text.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        return cls(
            vocab_size=read.positive("vocab_size", 202048),
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=read.positive("head_dim", hidden_size // num_heads if text.get("head_dim", 0) is None else 128),
            expert_mlp_size=read.positive("intermediate_size", 8192),
            dense_mlp_size=read.positive("intermediate_size_mlp", 16384),
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            moe_layers=_moe_layers(read, num_layers, read.positive("interleave_moe_layer_step", 1)),
            rope_layers=_rope_layers(read, num_layers, read.positive("no_rope_layer_interval", 4)),
            chunk_size=min(_chunk_size(text, read) or max_position, max_position),
            rope_theta=theta,
            rope_scaling=scaling,
            use_qk_norm=bool(text.get("use_qk_norm", True)),
            # The published configurations store 4 or true; absent means on.
            attn_temperature_tuning=bool(text.get("attn_temperature_tuning", True)),
            floor_scale=read.positive("floor_scale", 8192),
            attn_scale=read.number("attn_scale", 0.1),
            rms_norm_eps=read.number("rms_norm_eps", 1e-5),
            attention_bias=bool(text.get("attention_bias", False)),
            tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
            max_position_embeddings=max_position,
            eos_token_ids=tuple(eos),
            dtype=dtype if dtype in ("float32", "bfloat16") else "bfloat16",
        )


@dataclass(frozen=True)
class _Reader:
    text: dict[str, Any]
    where: str

    def positive(self, name: str, default: int) -> int:
        value = self.text.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self.where}: {name} must be a positive integer, got {value!r}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.text.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise UserError(f"{self.where}: {name} must be a number, got {value!r}")
        return float(value)

    def integers(self, name: str) -> list[int] | None:
        """A list, of one where there is a single integer; None where there is nothing."""
        value = self.text.get(name)
        if value is None:
            return None
        values: list[Any] = value if isinstance(value, list) else [value]
        if any(not isinstance(item, int) for item in values):
            raise UserError(f"{self.where}: {name} must be a list of integers, got {value!r}")
        return values


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; give the folder of a Hugging Face checkpoint "
            "(config.json, tokenizer.json, *.safetensors)"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return raw


def _chunk_size(text: dict[str, Any], read: _Reader) -> int | None:
    # Absent means 8192, null no chunks at all.
    return None if text.get("attention_chunk_size", 8192) is None else read.positive("attention_chunk_size", 8192)


def _moe_layers(read: _Reader, num_layers: int, step: int) -> tuple[int, ...]:
    listed = read.integers("moe_layers")
    layers = list(range(step - 1, num_layers, step)) if listed is None else sorted(set(listed))
    if any(not 0 <= layer < num_layers for layer in layers):
        raise UserError(f"{read.where}: moe_layers names a layer outside 0 to {num_layers - 1}: {listed}")
    return tuple(layers)


def _rope_layers(read: _Reader, num_layers: int, interval: int) -> tuple[bool, ...]:
    # An empty list means the default, as in the reference implementation.
    listed = read.integers("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if len(listed) < num_layers:
        raise UserError(f"{read.where}: no_rope_layers has {len(listed)} entries for {num_layers} layers")
    return tuple(bool(use_rope) for use_rope in listed[:num_layers])


def _rope(text: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    # transformers 5 writes one dictionary; the published checkpoints keep theta apart and call the rest rope_scaling.
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters and rope_scaling must be objects, got {rope!r}")
    read = _Reader({"rope_theta": text.get("rope_theta"), **rope}, where)
    theta = read.number("rope_theta", 500000.0)
    if theta <= 0:
        raise UserError(f"{where}: rope_theta must be positive, got {theta}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{where}: rope_type {kind!r} is not supported; Llama 4 uses default and llama3")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [name for name in names if name not in rope]:
        raise UserError(f"{where}: rope_type llama3 needs {missing[0]!r}")
    factor, low, high = (read.number(name, 1.0) for name in names[:3])
    if min(factor, low, high) <= 0:
        raise UserError(f"{where}: the factors of rope_type llama3 must be positive")
    return theta, RopeScaling(factor, low, high, read.positive(names[3], 8192))
