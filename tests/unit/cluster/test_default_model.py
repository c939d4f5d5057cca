"""The random checkpoint that a first run writes, and the check that every run makes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.default_model import default_model_dir, ensure_default_model
from cluster.errors import UsageError
from workers.checkpoint_check import check_checkpoint, tensor_shapes
from workers.errors import UserError
from workers.model_config import ModelConfig
from workers.random_checkpoint import RandomShape, write_random_checkpoint

SMALL = RandomShape(
    vocab_size=300,
    hidden_size=16,
    num_layers=4,
    num_heads=2,
    head_dim=8,
    expert_mlp_size=8,
    dense_mlp_size=16,
    num_experts=8,
    dtype="float32",
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    write_random_checkpoint(folder, SMALL, seed=3)
    return folder


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def check(folder: Path) -> None:
    check_checkpoint(folder, ModelConfig.from_folder(folder))


def test_transformers_reads_it(written: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(written, output_loading_info=True)
    assert not any(info.values()), info
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == tensor_shapes(
        ModelConfig.from_folder(written)
    )
    tokenizer = AutoTokenizer.from_pretrained(written)
    ids = tokenizer("def f(): 🙂 Ünïcode")["input_ids"]
    assert ids[0] == 0
    assert ids.count(0) == 1
    assert max(ids) < 300
    assert tokenizer.decode(ids[1:]) == "def f(): 🙂 Ünïcode"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|begin_of_text|><|header_start|>user<|header_end|>\n\nhi<|eot|>")


def test_the_same_seed_gives_the_same_weights(written: Path, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "again", SMALL, seed=3)
    write_random_checkpoint(tmp_path / "other", SMALL, seed=4)
    first, again, other = (
        load_file(p / "model.safetensors") for p in (written, tmp_path / "again", tmp_path / "other")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert {path.name for path in tmp_path.iterdir()} == {"again", "other"}, "nothing half-written stays"


def test_it_overwrites_nothing(written: Path) -> None:
    with pytest.raises(UserError, match="is there already"):
        write_random_checkpoint(written, SMALL)


def test_the_default_model_lies_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_model_dir().is_relative_to(tmp_path / "cache" / "caravan")
    folder = ensure_default_model()
    check(folder)
    model = ModelConfig.from_folder(folder)
    assert (model.num_experts, model.moe_layers, model.rope_layers[:4]) == (
        128,
        (1, 3, 5, 7),
        (True, True, True, False),
    )
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert ensure_default_model() == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp, "written once"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match="XDG_CACHE_HOME"):
        ensure_default_model()


def test_a_whole_checkpoint_passes(written: Path) -> None:
    check(written)


def test_a_prefix_and_an_index_pass(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({f"language_model.{name}": weights[name] for name in held}, copy / file)
    weight_map = {f"language_model.{name}": file for file, held in shards.items() for name in held}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    check(copy)
    (copy / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors: no such file, though"):
        check(copy)


@pytest.mark.parametrize("kept", [0, 5, 100, -10])
def test_a_truncated_file(copy: Path, kept: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors: is truncated or no safetensors file"):
        check(copy)


def test_a_missing_tensor(copy: Path) -> None:
    edit(copy, lambda weights: weights.pop("model.layers.1.feed_forward.experts.down_proj"))
    with pytest.raises(UserError, match=r"tensor model\.layers\.1\.feed_forward\.experts\.down_proj is missing"):
        check(copy)


def test_a_wrong_shape(copy: Path) -> None:
    edit(copy, lambda weights: weights.update({"lm_head.weight": torch.zeros(300, 8)}))
    with pytest.raises(UserError, match=r"lm_head\.weight has shape \[300, 8\], config\.json says \[300, 16\]"):
        check(copy)


def test_no_weights_at_all(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
        check(copy)


def edit(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
