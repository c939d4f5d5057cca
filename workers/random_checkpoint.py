"""A small Llama 4 text checkpoint of random weights in Hugging Face format: Maverick's shape at toy size.

For trying the machinery out: its text means nothing. The tokenizer is a byte-level BPE trained on the Python standard
library's own source, so the words of a prompt come through as on a real one.
"""

import json
import math
import os
import shutil
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from workers.checkpoint_check import tensor_shapes
from workers.errors import UserError
from workers.model_config import ModelConfig

SPECIAL_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|eot|>", "<|eom|>", "<|header_start|>", "<|header_end|>"),
    *("<|image_start|>", "<|image_end|>", "<|patch|>", "<|image|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
    *("<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>"),
)
BEGIN_OF_TEXT, END_OF_TEXT, EOT, EOM, PAD = 0, 1, 2, 3, 14
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|header_start|>{{ m['role'] }}<|header_end|>\n\n{{ m['content'] }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)


@dataclass(frozen=True)
class RandomShape:
    """Shape of a random checkpoint; the default is 10 million parameters, 20 MB in bfloat16."""

    vocab_size: int = 2048
    hidden_size: int = 128
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 1
    head_dim: int = 32
    expert_mlp_size: int = 48
    dense_mlp_size: int = 256
    num_experts: int = 128
    moe_step: int = 2
    """Every how many layers one is MoE: 2 is Maverick's, 1 is Scout's."""
    use_qk_norm: bool = False
    chunk_size: int = 256
    """Tokens of local attention's chunk."""
    floor_scale: int = 512
    """Tokens of attention temperature's floor."""
    max_position_embeddings: int = 8192
    dtype: str = "bfloat16"

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json."""
        return {
            "architectures": ["Llama4ForCausalLM"],
            "model_type": "llama4_text",
            "dtype": self.dtype,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.expert_mlp_size,
            "intermediate_size_mlp": self.dense_mlp_size,
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": self.moe_step,
            "use_qk_norm": self.use_qk_norm,
            "attention_chunk_size": self.chunk_size,
            "attn_temperature_tuning": True,
            "floor_scale": self.floor_scale,
            "attn_scale": 0.1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "max_position_embeddings": self.max_position_embeddings,
            "bos_token_id": BEGIN_OF_TEXT,
            "eos_token_id": [END_OF_TEXT, EOM, EOT],
            "pad_token_id": PAD,
        }


def write_random_checkpoint(out: Path, shape: RandomShape | None = None, seed: int = 0) -> None:
    """Write the folder `out`: all of it or, when anything fails, nothing.

    Args:
        seed: the same seed and shape give the same weights.

    Raises:
        UserError: `out` is there already, or cannot be written.
    """
    shape = shape or RandomShape()
    if out.exists():
        raise UserError(f"{out}: is there already; name a new folder, or remove this one")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name a folder that can") from None
    try:
        _write_tokenizer(folder, shape.vocab_size)
        _write_json(folder / "config.json", shape.to_dict())
        _write_json(
            folder / "generation_config.json",
            {
                "bos_token_id": BEGIN_OF_TEXT,
                "eos_token_id": [END_OF_TEXT, EOM, EOT],
                "pad_token_id": PAD,
                "do_sample": True,
                "temperature": 0.6,
                "top_p": 0.9,
            },
        )
        weights = random_weights(ModelConfig.from_dict(shape.to_dict()), seed, getattr(torch, shape.dtype))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        folder.chmod(0o755)
        os.rename(folder, out)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{out}: cannot be written ({error.strerror}); free some space or name another") from None
        raise


def random_weights(model: ModelConfig, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of a text-only checkpoint by its Hugging Face name, normal with variance 1 / fan-in."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=dtype)
        fan_in = shape[-2] if ".experts." in name else shape[-1]
        deviation = 0.02 if "embed" in name else 1 / math.sqrt(fan_in)
        return (torch.randn(shape, generator=generator) * deviation).to(dtype)

    return {name: draw(name, shape) for name, shape in tensor_shapes(model).items()}


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL_TOKENS[BEGIN_OF_TEXT]} $A",
        pair=f"{SPECIAL_TOKENS[BEGIN_OF_TEXT]} $A $B",
        special_tokens=[(SPECIAL_TOKENS[BEGIN_OF_TEXT], BEGIN_OF_TEXT)],
    )
    corpus = sorted(str(path) for path in Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train(corpus, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[BEGIN_OF_TEXT],
            "eos_token": SPECIAL_TOKENS[EOT],
            "pad_token": SPECIAL_TOKENS[PAD],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
