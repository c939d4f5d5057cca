"""Writes a trained model as a Hugging Face checkpoint in bfloat16."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from workers.training.nano_model import NanoModel
from workers.training.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, EOM, EOT, PAD, tokenizer_config


def export(model: NanoModel, shape: dict[str, Any], tokenizer: Tokenizer, out: Path, dtype: str = "bfloat16") -> None:
    """Write config.json, generation_config.json, the tokenizer and model.safetensors into `out`.

    What else lies in `out` (a README, a licence) stays; each file is replaced whole.

    Args:
        shape: the contents of config.json, without token numbers.
        dtype: "bfloat16" or "float32".
    """
    out.mkdir(parents=True, exist_ok=True)
    ends = [tokenizer.token_to_id(token) for token in (END_OF_TEXT, EOM, EOT)]
    tokens = {
        "bos_token_id": tokenizer.token_to_id(BEGIN_OF_TEXT),
        "eos_token_id": ends,
        "pad_token_id": tokenizer.token_to_id(PAD),
    }
    folder = Path(tempfile.mkdtemp(prefix=".export.", dir=out))
    try:
        _write_json(folder / "config.json", {"architectures": ["Llama4ForCausalLM"], **shape, "dtype": dtype, **tokens})
        _write_json(folder / "generation_config.json", {**tokens, "do_sample": True, "temperature": 0.6, "top_p": 0.9})
        _write_json(folder / "tokenizer_config.json", tokenizer_config(shape["max_position_embeddings"]))
        tokenizer.save(str(folder / "tokenizer.json"))
        state = {name: tensor.to("cpu", getattr(torch, dtype)) for name, tensor in model.checkpoint_state().items()}
        save_file(
            {name: tensor.contiguous() for name, tensor in state.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        for file in sorted(folder.iterdir()):
            file.chmod(0o644)
            file.replace(out / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
