"""The model that ships: what its README says of it holds."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Llama4ForCausalLM

from tests.local_engine import LocalRank, engine_config, greedy
from workers.model_config import ModelConfig
from workers.training.corpus import DOCUMENT_SEPARATOR
from workers.training.evaluate import HeldOut, Quality, evaluate
from workers.training.nano_model import NanoModel

NANO = Path(__file__).resolve().parents[2] / "workers/nano"
OPENINGS = ("Call me Ishmael.", "It is a truth universally acknowledged", "In the beginning God created the heaven")


@pytest.fixture(scope="module")
def model() -> NanoModel:
    model = NanoModel(ModelConfig.from_folder(NANO))
    with safe_open(NANO / "model.safetensors", "pt") as file:
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    model.load_state_dict(state, strict=False)
    assert set(state) == set(model.checkpoint_state())
    return model.eval()


@pytest.fixture(scope="module")
def heldout() -> HeldOut:
    text = (NANO / "heldout.txt").read_text(encoding="utf-8")
    return HeldOut(text, Tokenizer.from_file(str(NANO / "tokenizer.json")).encode(text).ids)


@pytest.fixture(scope="module")
def quality(model: NanoModel, heldout: HeldOut) -> Quality:
    # Every third window: the whole takes a quarter of a minute, and says the same.
    return evaluate(model, heldout, 512, 511, every=3)


def test_it_has_mavericks_shape() -> None:
    config = ModelConfig.from_folder(NANO)
    assert (config.num_experts, config.experts_per_token) == (128, 1)
    assert config.moe_layers == tuple(range(1, config.num_layers, 2))
    assert config.rope_layers == tuple((layer + 1) % 4 != 0 for layer in range(config.num_layers))
    assert not config.use_qk_norm
    assert config.attn_temperature_tuning
    assert config.num_heads % config.num_kv_heads == 0
    assert len(config.eos_token_ids) == 3


def test_it_is_small_and_licensed() -> None:
    assert (NANO / "model.safetensors").stat().st_size <= 40e6
    with safe_open(NANO / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert "Apache License" in (NANO / "LICENSE").read_text()
    assert "no weight of Meta's" in (NANO / "README.md").read_text()


def test_held_out_documents_are_shipped() -> None:
    documents = (NANO / "heldout.txt").read_text(encoding="utf-8").removesuffix("\n").split(DOCUMENT_SEPARATOR)
    assert len(documents) == 60
    assert all(document == document.strip() and document for document in documents)


def test_no_expert_starves_or_drowns(quality: Quality) -> None:
    assert quality.shares_ME.shape == (4, 128)
    assert quality.shares_ME.mean(1).tolist() == pytest.approx([1.0] * 4)
    assert quality.shares_ME.min() >= 0.2
    assert quality.shares_ME.max() <= 5.0


def test_it_predicts_the_held_out_text_as_its_readme_says(quality: Quality) -> None:
    rows = re.findall(r"^\| this model, \w+ \|.*\| ([\d.]+) \| ([\d.]+) \|$", (NANO / "README.md").read_text(), re.M)
    assert len(rows) == 2
    for perplexity, bits_per_byte in rows:
        # A part of the text in shorter windows, so near it only.
        assert quality.perplexity == pytest.approx(float(perplexity), rel=0.1)
        assert quality.bits_per_byte == pytest.approx(float(bits_per_byte), rel=0.05)


def test_transformers_loads_it_and_generates_the_same_tokens(model: NanoModel) -> None:
    reference = Llama4ForCausalLM.from_pretrained(NANO, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    prompts = [tokenizer(opening).input_ids for opening in OPENINGS]
    # The last crosses a chunk of local attention.
    text = (NANO / "heldout.txt").read_text(encoding="utf-8")
    prompts.append(tokenizer(text).input_ids[:200])
    rank = LocalRank(engine_config(NANO))
    ours = rank.generate([greedy(n, prompt, 24) for n, prompt in enumerate(prompts)])
    for prompt, tokens in zip(prompts, ours, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=24, do_sample=False
        )
        assert tokens == expected[0, len(prompt) :].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompt]))[0]
            torch.testing.assert_close(logits, reference(torch.tensor([prompt])).logits, atol=2e-4, rtol=0)
