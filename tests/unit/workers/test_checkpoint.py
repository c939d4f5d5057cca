"""Checkpoints on disk: every layout, exact counts of bytes, and a sentence for each that is broken."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import MAVERICK, SCOUT, edit_tensors, write
from tests.exactness import Written
from tests.local_engine import LocalRank, engine_config, greedy, prompt
from workers.checkpoint import INDEX, Checkpoint
from workers.errors import UserError
from workers.expert_map import ExpertMap
from workers.model_config import ModelConfig
from workers.weights import ModelWeights, load_weights

SMALL = {**MAVERICK, "num_local_experts": 8, "num_hidden_layers": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, SMALL)
    return tmp_path


def load(
    folder: Path,
    expert_map: ExpertMap | None = None,
    rank: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[ModelWeights, int]:
    """Weights, and the bytes that were read."""
    config, checkpoint = ModelConfig.from_folder(folder), Checkpoint(folder)
    expert_map = expert_map or ExpertMap.even(config.num_moe_layers, config.num_experts, [0])
    weights = load_weights(checkpoint, config, expert_map, rank, torch.float32, torch.device("cpu"), progress)
    return weights, checkpoint.bytes_read


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        load(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def nest(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As in the multimodal checkpoints, with a piece of the vision model."""
    nested = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    return {
        **nested,
        "vision_model.class_embedding": torch.ones(8),
        "multi_modal_projector.linear_1.weight": torch.ones(2),
    }


def assert_whole(folder: Path) -> None:
    """The checkpoint computes the same as one whose layout is the plainest."""
    weights, _ = load(folder)
    plain = load_file(next(folder.parent.glob("plain/*.safetensors")))
    assert torch.equal(weights.embedding, plain["model.embed_tokens.weight"])
    moe = weights.layers[1].mlp
    for slot, expert in enumerate(moe.routed.experts):
        stored = plain["model.layers.1.feed_forward.experts.gate_up_proj"][expert]
        assert torch.equal(moe.routed.gate_up[slot], stored.T)
    assert torch.equal(weights.head, plain["lm_head.weight"])


@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("shards", ["one", "many", "many without an index"])
def test_layouts(tmp_path: Path, prefixed: bool, shards: str) -> None:
    write(tmp_path / "plain", SMALL)
    folder = tmp_path / "layout"
    write(folder, SMALL, **({} if shards == "one" else {"max_shard_size": "200KB"}))
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 3) == (shards != "one")
    if prefixed:
        for path in files:
            save_file(nest(load_file(path)), path)
        if (folder / INDEX).exists():
            index = json.loads((folder / INDEX).read_text())
            index["weight_map"] = {f"language_model.{name}": file for name, file in index["weight_map"].items()}
            (folder / INDEX).write_text(json.dumps(index))
    if shards.endswith("index"):
        (folder / INDEX).unlink()
    assert_whole(folder)


def test_shards_serve_the_same_tokens(tmp_path: Path, maverick: Written) -> None:
    maverick.reference.model.save_pretrained(tmp_path, max_shard_size="300KB")
    ids = prompt(1, 60)
    outputs = [LocalRank(engine_config(folder)).generate([greedy(0, ids, 8)]) for folder in (maverick.folder, tmp_path)]
    assert outputs[0] == outputs[1]


def test_a_rank_reads_its_quarter_of_the_experts_and_no_more(maverick: Written) -> None:
    config = ModelConfig.from_folder(maverick.folder)
    expert_map = ExpertMap.even(config.num_moe_layers, config.num_experts, [0, 1, 2, 3])
    tensors = load_file(maverick.folder / "model.safetensors")
    routed = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    rest = sum(tensor.nbytes for tensor in tensors.values()) - routed
    # By hand: 4 MoE layers of 128 experts, each 64 x 64 and 32 x 64 in float32.
    assert routed == 4 * 128 * (64 * 64 + 32 * 64) * 4
    for rank in range(4):
        reports: list[tuple[int, int]] = []
        weights, bytes_read = load(
            maverick.folder, expert_map, rank, lambda done, total, to=reports: to.append((done, total))
        )
        assert bytes_read == rest + routed // 4
        assert [layer.mlp.routed.experts for layer in weights.layers[1::2]] == [
            list(range(32 * rank, 32 * rank + 32))
        ] * 4
        assert reports == sorted(reports)
        assert {total for _, total in reports} == {bytes_read}
        assert reports[-1] == (bytes_read, bytes_read)
        assert len(reports) == 9


@pytest.mark.parametrize(
    "shape",
    [
        {**SCOUT, "tie_word_embeddings": True},
        {**MAVERICK, "attention_bias": True, "num_key_value_heads": 4},
        {**MAVERICK, "moe_layers": [2], "num_hidden_layers": 3},
    ],
    ids=["tied", "bias", "one-moe-layer"],
)
def test_the_announced_total_is_what_is_read(tmp_path: Path, shape: dict[str, object]) -> None:
    write(tmp_path, shape)
    reports: list[tuple[int, int]] = []
    _, bytes_read = load(tmp_path, progress=lambda done, total: reports.append((done, total)))
    assert bytes_read == sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    assert reports[-1] == (bytes_read, bytes_read)


def test_an_uneven_map_with_replicas(folder: Path) -> None:
    layers = (((0,), (1,), (1, 0), (0,), (1,), (1,), (1,), (1,)), ((1,),) * 8)
    weights, _ = load(folder, ExpertMap(layers), rank=0)
    held = [layer.mlp.routed for layer in weights.layers[1::2]]
    assert [layer.experts for layer in held] == [[0, 2, 3], []]
    stored = load_file(folder / "model.safetensors")["model.layers.1.feed_forward.experts.down_proj"]
    assert torch.equal(held[0].down, stored[[0, 2, 3]].transpose(1, 2))
    assert held[1].gate_up.shape == (0, 64, 64)


# ---- what is broken ----------------------------------------------------------------------------------------------


def test_a_folder_without_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == f"{folder}: holds no *.safetensors; give the folder of a Hugging Face checkpoint"


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.2.self_attn.k_proj.weight",
        "model.layers.3.feed_forward.experts.down_proj",
        "model.layers.1.feed_forward.shared_expert.up_proj.weight",
    ],
)
def test_a_missing_tensor(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    assert refusal(folder) == f"{folder}: tensor {name} is missing from the checkpoint; copy it again"


@pytest.mark.parametrize(
    ("name", "shape", "want"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (64, 64), [128, 64]),
        ("model.layers.1.feed_forward.experts.gate_up_proj", (7, 64, 64), [8, 64, 64]),
        ("model.norm.weight", (1, 64), [64]),
        ("model.norm.weight", (), [64]),
    ],
)
def test_a_wrong_shape(folder: Path, name: str, shape: tuple[int, ...], want: list[int]) -> None:
    edit_tensors(folder, lambda tensors: {**tensors, name: torch.zeros(shape)})
    assert refusal(folder) == (
        f"{folder / 'model.safetensors'}: tensor {name} has shape {list(shape)}, config.json says {want}; "
        "the checkpoint and its configuration do not belong together"
    )


@pytest.mark.parametrize("size", [0, 4, 100, 50_000, -1])
def test_a_truncated_file(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:size])
    assert refusal(folder).startswith(f"{path}: is truncated or no safetensors file (")


def test_a_file_that_is_something_else(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert refusal(folder).startswith(f"{path}: is truncated or no safetensors file (")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write(tmp_path, SMALL, max_shard_size="200KB")
    return tmp_path


def test_a_missing_shard(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[2]
    path.unlink()
    assert refusal(sharded) == f"{path}: no such file, though {INDEX} names it; copy the checkpoint again"


def test_a_truncated_shard(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(sharded).startswith(f"{path}: is truncated or no safetensors file (")


def test_an_index_that_names_the_wrong_file(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    name = "model.norm.weight"
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"][name])
    index["weight_map"][name] = other
    (sharded / INDEX).write_text(json.dumps(index))
    assert refusal(sharded) == (
        f"{sharded / other}: tensor {name} is missing, though {INDEX} says it is there; copy the file again"
    )


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    assert refusal(sharded).startswith(f"{sharded / INDEX}: is no index of safetensors files (")


def test_an_index_of_another_checkpoint(sharded: Path) -> None:
    (sharded / INDEX).write_text('{"weight_map": {"transformer.wte": "model.safetensors"}}')
    assert refusal(sharded).startswith(f"{sharded}: tensor model.embed_tokens.weight is missing from the checkpoint")
