"""Checkpoints for timing: Maverick's shape with any number of experts, bf16, random weights from a seed.

What they hold does not matter to the time, but its distribution does: hidden states that vanish or explode, or expert
routers that all choose alike, would be another load.
"""

import sysconfig
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Llama4ForCausalLM, Llama4TextConfig

VOCABULARY = 8192
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot|>", "<|finetune_right_pad|>")
MINI_EXPERTS, MINI_EXPERT_MLP = 128, 512
# Drawing hundreds of millions of numbers takes longer than writing them. A prime, so that no two experts are alike.
NOISE_VALUES = 16_777_259


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE over Python's own standard library, so that every token has a text, and nothing is downloaded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def text_config(experts: int = MINI_EXPERTS, expert_mlp: int = MINI_EXPERT_MLP) -> Llama4TextConfig:
    """Eight layers of 512: every 2nd is MoE, every 4th global, local attention in chunks of 256; context 65536."""
    return Llama4TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        num_hidden_layers=8,
        intermediate_size=expert_mlp,
        intermediate_size_mlp=1024,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts_per_tok=1,
        num_local_experts=experts,
        interleave_moe_layer_step=2,
        use_qk_norm=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attention_chunk_size=256,
        floor_scale=512,
        attn_scale=0.1,
        attn_temperature_tuning=True,
        max_position_embeddings=65536,
        bos_token_id=SPECIAL.index("<|begin_of_text|>"),
        eos_token_id=SPECIAL.index("<|eot|>"),
        pad_token_id=SPECIAL.index("<|finetune_right_pad|>"),
        architectures=["Llama4ForCausalLM"],
        dtype="bfloat16",
    )


def write_checkpoint(folder: Path, config: Llama4TextConfig, tokenizer: Tokenizer, seed: int = 0) -> int:
    """Write a Hugging Face folder, and return how many bytes of weights are in it."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty(NOISE_VALUES, dtype=torch.bfloat16).normal_(generator=generator)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Llama4ForCausalLM(config).named_parameters()}
    tensors, at = {}, 0
    for name, shape in shapes.items():
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        fan_in = shape[-2] if "experts" in name and "shared" not in name else shape[-1]
        std = 0.02 if "embed" in name else fan_in**-0.5
        tensors[name] = _repeated(noise, at, shape.numel()).view(shape).mul_(std)
        at = (at + shape.numel()) % NOISE_VALUES
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def _repeated(noise: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """`count` values of the endless repetition of `noise`, from `start` on."""
    filled = torch.empty(count, dtype=noise.dtype)
    done = 0
    while done < count:
        part = noise[start : start + count - done]
        filled[done : done + len(part)] = part
        done, start = done + len(part), 0
    return filled
