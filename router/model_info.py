"""What a router must know about a checkpoint: names and numbers, no weights."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router.errors import RouterConfigError

MODEL_TYPES = ("llama4", "llama4_text")


@dataclass(frozen=True)
class SamplingDefaults:
    """Sampling of a request that does not say."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """Likeliest tokens kept; 0 keeps all."""


@dataclass(frozen=True)
class ModelInfo:
    """A Llama 4 checkpoint as seen from the front door."""

    name: str
    vocab_size: int
    """Rows of the embedding: valid token ids are 0 to vocab_size - 1."""
    eos_token_ids: tuple[int, ...]
    """From generation_config.json, else config.json; ids past the vocabulary are left out."""
    num_layers: int
    num_moe_layers: int
    num_experts: int
    """Logical experts of a MoE layer."""
    defaults: SamplingDefaults

    @classmethod
    def from_folder(cls, folder: Path, name: str = "") -> "ModelInfo":
        """Reads config.json and, where there is one, generation_config.json.

        Args:
            folder: a Hugging Face checkpoint.
            name: name to serve under; empty: the folder's name.

        Raises:
            RouterConfigError: the folder is no Llama 4 checkpoint, or a value in it makes no sense.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise RouterConfigError(f"{folder} is no folder; give the folder of a Hugging Face checkpoint")
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise RouterConfigError(f"{folder} is not a checkpoint: it has no config.json")
        top = _read_json(config_file)
        if top.get("model_type") not in MODEL_TYPES:
            raise RouterConfigError(
                f"{config_file}: model_type is {top.get('model_type')!r}; Caravan serves {' and '.join(MODEL_TYPES)}"
            )
        text = top.get("text_config", top)
        if not isinstance(text, dict):
            raise RouterConfigError(f"{config_file}: text_config must be an object")
        generation_file = folder / "generation_config.json"
        generation = _read_json(generation_file) if generation_file.is_file() else {}
        vocab_size = _positive_int(text, "vocab_size", config_file)
        num_layers = _positive_int(text, "num_hidden_layers", config_file)
        eos = next(
            (ids for source in (generation, text, top) if (ids := _token_ids(source.get("eos_token_id"))) is not None),
            (),
        )
        return cls(
            name=name or folder.resolve().name,
            vocab_size=vocab_size,
            eos_token_ids=tuple(i for i in eos if 0 <= i < vocab_size),
            num_layers=num_layers,
            num_moe_layers=_count_moe_layers(text, num_layers, config_file),
            num_experts=_positive_int(text, "num_local_experts", config_file, default=16),
            defaults=_sampling_defaults(generation, generation_file),
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RouterConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise RouterConfigError(f"{path} must hold a JSON object")
    return value


def _positive_int(config: dict[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RouterConfigError(f"{path}: {key} must be a whole number of at least 1, got {value!r}")
    return value


def _token_ids(value: object) -> tuple[int, ...] | None:
    """Ids as config files write them: one number or a list of numbers."""
    values = value if isinstance(value, list) else [value]
    ids = tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool))
    return ids or None


def _count_moe_layers(text: dict[str, Any], num_layers: int, path: Path) -> int:
    layers = text.get("moe_layers")
    if layers is None:
        step = _positive_int(text, "interleave_moe_layer_step", path, default=1)
        return len(range(step - 1, num_layers, step))
    if not isinstance(layers, list):
        raise RouterConfigError(f"{path}: moe_layers must be a list of layer numbers, got {layers!r}")
    return len(layers)


def _sampling_defaults(generation: dict[str, Any], path: Path) -> SamplingDefaults:
    """The file's values, unless it says `do_sample: false`: then it switched them off."""
    if generation.get("do_sample") is False:
        return SamplingDefaults()
    temperature = _number(generation, "temperature", 1.0, path)
    top_p = _number(generation, "top_p", 1.0, path)
    top_k = _number(generation, "top_k", 0, path)
    if temperature < 0:
        raise RouterConfigError(f"{path}: temperature must be at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise RouterConfigError(f"{path}: top_p must be more than 0 and at most 1, got {top_p}")
    if top_k < 0 or top_k != int(top_k):
        raise RouterConfigError(f"{path}: top_k must be a whole number of at least 0, got {top_k}")
    return SamplingDefaults(temperature, top_p, int(top_k))


def _number(config: dict[str, Any], key: str, default: float, path: Path) -> float:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise RouterConfigError(f"{path}: {key} must be a number, got {value!r}")
    return value
