"""A checkpoint without weights: a small byte-level BPE with Llama 4's special tokens, and the config files."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot|>", "<|header_start|>", "<|header_end|>"]
BEGIN, END, EOT = 0, 1, 2
TEXT = [
    "The whale and the sea, the sea and the whale; call me what you will.",
    "über façade naïve Привет мир こんにちは世界 你好 안녕하세요 नमस्ते สวัสดี مرحبا שלום 👩‍👩‍👧‍👦 e\u0301",
] * 3


def build_tokenizer(vocab_size: int = 400) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    # Added but not special: one in the byte alphabet, one outside it, one that starts in it and leaves it.
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<tool>", "two words", "Ġx é☃")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", BEGIN)]
    )
    return tokenizer


def write_checkpoint(folder: Path, **generation: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "llama4_text",
        "vocab_size": tokenizer.get_vocab_size() + 5,
        "num_hidden_layers": 4,
        "interleave_moe_layer_step": 2,
        "num_local_experts": 8,
        "eos_token_id": END,
    }
    (folder / "config.json").write_text(json.dumps(config))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
