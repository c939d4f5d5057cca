"""config.json in every dialect, and a sentence for each that cannot be served."""

import copy
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Llama4TextConfig

from tests.checkpoints import BEHEMOTH, MAVERICK, SCOUT, published
from workers.errors import UserError
from workers.model_config import ModelConfig, RopeScaling

# As published with meta-llama/Llama-4-Maverick-17B-128E-Instruct and Llama-4-Scout-17B-16E-Instruct, text part.
PUBLISHED_TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attention_dropout": 0.0,
    "bos_token_id": 200000,
    "eos_token_id": [200001, 200007, 200008],
    "for_llm_compressor": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 1048576,
    "model_type": "llama4_text",
    "no_rope_layers": [],
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "output_router_logits": False,
    "pad_token_id": 200018,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "router_aux_loss_coef": 0.001,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 202048,
}
PUBLISHED_MAVERICK: dict[str, Any] = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "boi_token_index": 200080,
    "eoi_token_index": 200081,
    "image_token_index": 200092,
    "model_type": "llama4",
    "text_config": {
        **PUBLISHED_TEXT,
        "interleave_moe_layer_step": 2,
        "num_local_experts": 128,
        "use_qk_norm": False,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1408, "model_type": "llama4_vision_model", "num_hidden_layers": 34},
}
PUBLISHED_SCOUT: dict[str, Any] = {
    **PUBLISHED_MAVERICK,
    "text_config": {
        **PUBLISHED_TEXT,
        "interleave_moe_layer_step": 1,
        "num_local_experts": 16,
        "use_qk_norm": True,
        "max_position_embeddings": 10485760,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
}


def toy(**changes: Any) -> dict[str, Any]:
    return {**MAVERICK, "model_type": "llama4_text", **changes}


def test_published_maverick() -> None:
    config = ModelConfig.from_dict(PUBLISHED_MAVERICK)
    assert config.moe_layers == tuple(range(1, 48, 2))
    assert config.num_moe_layers == 24
    assert [layer for layer, rope in enumerate(config.rope_layers) if not rope] == list(range(3, 48, 4))
    assert (config.num_experts, config.experts_per_token) == (128, 1)
    assert (config.hidden_size, config.num_layers, config.head_dim) == (5120, 48, 128)
    assert (config.num_heads, config.num_kv_heads, config.vocab_size) == (40, 8, 202048)
    assert (config.expert_mlp_size, config.dense_mlp_size) == (8192, 16384)
    assert (config.rope_theta, config.rope_scaling, config.use_qk_norm) == (500000.0, None, False)
    assert (config.chunk_size, config.floor_scale, config.attn_scale) == (8192, 8192, 0.1)
    assert config.attn_temperature_tuning
    assert not config.tie_word_embeddings
    assert config.eos_token_ids == (200001, 200007, 200008)
    assert (config.max_position_embeddings, config.dtype) == (1048576, "bfloat16")


def test_published_scout() -> None:
    config = ModelConfig.from_dict(PUBLISHED_SCOUT)
    assert config.moe_layers == tuple(range(48))
    assert (config.num_experts, config.use_qk_norm) == (16, True)
    assert config.rope_scaling == RopeScaling(16.0, 1.0, 1.0, 8192)


@pytest.mark.parametrize("shape", [MAVERICK, SCOUT, BEHEMOTH], ids=["maverick", "scout", "behemoth"])
def test_both_dialects_say_the_same(shape: dict[str, Any]) -> None:
    new = Llama4TextConfig(**shape, dtype="float32").to_dict()
    assert "rope_parameters" in new
    old = published(new)
    assert "rope_theta" in old["text_config"]
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(old)


def test_defaults_are_the_reference_implementations() -> None:
    ours = ModelConfig.from_dict({"model_type": "llama4_text"})
    theirs = Llama4TextConfig()
    # But for the end-of-text token: 2 in a Llama 4 vocabulary is no such thing.
    assert ours == ModelConfig.from_dict(theirs.to_dict() | {"dtype": None, "eos_token_id": None})
    assert (ours.num_layers, ours.num_experts, ours.head_dim) == (48, 16, 128)


@pytest.mark.parametrize(
    ("raw", "tuned"), [({}, True), ({"attn_temperature_tuning": 4}, True), ({"attn_temperature_tuning": True}, True)]
    + [({"attn_temperature_tuning": value}, False) for value in (False, 0)],
)  # fmt: skip
def test_attention_temperature(raw: dict[str, Any], tuned: bool) -> None:
    config = toy()
    del config["attn_temperature_tuning"]
    assert ModelConfig.from_dict(config | raw).attn_temperature_tuning is tuned


@pytest.mark.parametrize("listed", [None, []])
def test_an_empty_list_of_nope_layers_is_the_default(listed: list[int] | None) -> None:
    config = ModelConfig.from_dict(toy(no_rope_layers=listed))
    assert config.rope_layers == (True, True, True, False) * 2
    assert ModelConfig.from_dict(toy(no_rope_layers=listed, no_rope_layer_interval=2)).rope_layers == (True, False) * 4


def test_lists_of_layers_are_taken_as_they_are() -> None:
    config = ModelConfig.from_dict(toy(no_rope_layers=[0, 1] * 4, moe_layers=[5, 0, 5]))
    assert config.rope_layers == (False, True) * 4
    assert config.moe_layers == (0, 5)


@pytest.mark.parametrize(
    ("raw", "scaling"),
    [
        ({"rope_theta": 10000.0}, None),
        ({"rope_theta": 10000.0, "rope_scaling": {"rope_type": "default"}}, None),
        (
            {
                "rope_theta": 10000.0,
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 8192,
                },
            },
            RopeScaling(8.0, 1.0, 4.0, 8192),
        ),
        ({"rope_parameters": {"rope_theta": 10000.0}}, None),
    ],
)
def test_rope(raw: dict[str, Any], scaling: RopeScaling | None) -> None:
    config = toy()
    del config["rope_parameters"]
    read = ModelConfig.from_dict(config | raw)
    assert (read.rope_theta, read.rope_scaling) == (10000.0, scaling)


def test_sizes_that_may_be_null() -> None:
    config = ModelConfig.from_dict(toy(head_dim=None, num_key_value_heads=None, attention_chunk_size=None))
    assert (config.head_dim, config.num_kv_heads, config.chunk_size) == (8, 8, 4096)


@pytest.mark.parametrize(
    ("eos", "generation", "want"),
    [(2, None, (2,)), ([2, 5], None, (2, 5)), (None, None, ()), (2, [7, 8], (7, 8)), (2, 9, (9,))],
)
def test_end_of_text_tokens(tmp_path: Path, eos: Any, generation: Any, want: tuple[int, ...]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(toy(eos_token_id=eos)))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == want


@pytest.mark.parametrize(
    ("raw", "dtype"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"torch_dtype": "float32"}, "float32"),
        ({"dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "bfloat16"),
        ({}, "bfloat16"),
    ],
)
def test_dtype(raw: dict[str, Any], dtype: str) -> None:
    assert ModelConfig.from_dict(toy(**raw)).dtype == dtype


LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, got '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer, got -1"),
        ({"head_dim": True}, "head_dim must be a positive integer, got True"),
        ({"floor_scale": 0.5}, "floor_scale must be a positive integer, got 0.5"),
        ({"num_key_value_heads": 3}, "num_attention_heads (8) is no multiple of num_key_value_heads (3)"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok (129) exceeds num_local_experts (128)"),
        ({"moe_layers": [8]}, "moe_layers names a layer outside 0 to 7"),
        ({"no_rope_layers": [1, 1]}, "no_rope_layers has 2 entries for 8 layers"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"rope_parameters": LLAMA3}, "needs 'original_max_position_embeddings'"),
        ({"rope_parameters": {**LLAMA3, "factor": 0, "original_max_position_embeddings": 9}}, "must be positive"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta must be positive, got -1"),
        ({"rope_parameters": [1]}, "rope_parameters and rope_scaling must be objects, got [1]"),
        ({"attn_scale": "big"}, "attn_scale must be a number, got 'big'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number, got nan"),
        ({"moe_layers": "all"}, "moe_layers must be a list of integers, got 'all'"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a list of integers, got '</s>'"),
        ({"attention_chunk_size": 0}, "attention_chunk_size must be a positive integer, got 0"),
    ],
)
def test_what_cannot_be_served(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        ModelConfig.from_dict(toy(**changes), where="here/config.json")
    assert str(raised.value).startswith("here/config.json: ")
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=3), st.just([]), st.just({}),
    st.lists(st.one_of(st.none(), st.text(max_size=2), st.integers(-2, 9), st.floats()), min_size=1, max_size=9),
    st.just({"rope_type": "llama3", "factor": "x"}), st.just({"rope_type": ["llama3"]}), st.just({"a": None}),
)  # fmt: skip
NAMES = sorted({*PUBLISHED_SCOUT["text_config"], "rope_parameters", "moe_layers", "tie_word_embeddings", "attn_scale"})


@given(changes=st.dictionaries(st.sampled_from(NAMES), JUNK, min_size=1, max_size=3), nested=st.booleans())
def test_junk_is_read_or_refused_but_never_a_stack_trace(changes: dict[str, Any], nested: bool) -> None:
    raw = copy.deepcopy(PUBLISHED_SCOUT)
    (raw["text_config"] if nested else raw).update(changes)
    with suppress(UserError):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no such file; give the folder of a Hugging Face checkpoint"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[]", "must hold a JSON object"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=sentence) as raised:
        ModelConfig.from_folder(tmp_path)
    assert str(tmp_path / "config.json") in str(raised.value)


def test_config_json_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        ModelConfig.from_folder(tmp_path)


def test_a_generation_config_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(toy()))
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json: cannot be read as JSON"):
        ModelConfig.from_folder(tmp_path)


def test_reading_it_imports_no_torch() -> None:
    code = "import sys, workers.model_config, workers.scheduler; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
