"""Weights out of a packed file: bit for bit those of the checkpoint, read-only, and where they come from when not."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoints import MAVERICK, SCOUT, edit_config, edit_tensors, write
from tests.exactness import Exactness, Written
from tests.local_engine import LocalRank, engine_config, greedy, prompt
from workers import packed_loading, packed_weights
from workers.checkpoint import Checkpoint
from workers.checkpoint_fingerprint import checkpoint_fingerprint
from workers.config import EngineConfig
from workers.errors import UserError
from workers.expert_map import ExpertMap
from workers.model_config import ModelConfig
from workers.packed_file import PAGE, PackFile
from workers.packed_layout import held_numel, packed_tensors
from workers.packed_loading import LoadProgress, rank_weights
from workers.weights import ExpertWeights, ModelWeights, load_weights

SMALL = {**MAVERICK, "num_local_experts": 8, "num_hidden_layers": 4}
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "model", SMALL)
    return tmp_path / "model"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(
    folder: Path,
    cache: Path,
    dtype: torch.dtype = torch.float32,
    expert_map: ExpertMap | None = None,
    rank: int = 0,
    **engine: Any,
) -> tuple[ModelWeights, list[LoadProgress]]:
    model = ModelConfig.from_folder(folder)
    expert_map = expert_map or ExpertMap.even(model.num_moe_layers, model.num_experts, [0])
    reports: list[LoadProgress] = []
    config = EngineConfig(folder, weights_cache_dir=cache, **engine)
    return rank_weights(config, model, expert_map, rank, dtype, CPU, reports.append), reports


def private(folder: Path, dtype: torch.dtype, expert_map: ExpertMap | None = None, rank: int = 0) -> ModelWeights:
    model = ModelConfig.from_folder(folder)
    expert_map = expert_map or ExpertMap.even(model.num_moe_layers, model.num_experts, [0])
    return load_weights(Checkpoint(folder), model, expert_map, rank, dtype, CPU)


def named(weights: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor (or what else lies there) of weights; of routed experts those held, in order."""
    if isinstance(weights, ExpertWeights):
        yield f"{name}.experts", weights.experts
        yield f"{name}.gate_up", weights.gate_up[weights.slots]
        yield f"{name}.down", weights.down[weights.slots]
    elif dataclasses.is_dataclass(weights):
        for field in dataclasses.fields(weights):
            yield from named(getattr(weights, field.name), f"{name}.{field.name}")
    elif isinstance(weights, list):
        for number, item in enumerate(weights):
            yield from named(item, f"{name}.{number}")
    else:
        yield name, weights


def assert_same(one: ModelWeights, other: ModelWeights) -> None:
    found, wanted = dict(named(one)), dict(named(other))
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        got = found[name]
        if isinstance(want, Tensor):
            assert (got.dtype, got.shape) == (want.dtype, want.shape), name
            assert torch.equal(got, want), name
        else:
            assert got == want, name


def packs(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_the_same_bits_as_read_from_the_checkpoint(
    tmp_path: Path, cache: Path, dtype: torch.dtype, stored: torch.dtype
) -> None:
    write(tmp_path / "model", SMALL, edit=lambda model: model.to(stored), max_shard_size="200KB")
    folder = tmp_path / "model"
    for _ in range(2):
        assert_same(load(folder, cache, dtype)[0], private(folder, dtype))


@pytest.mark.parametrize(
    "shape",
    [
        SCOUT,
        {**SCOUT, "tie_word_embeddings": True},
        {**SMALL, "attention_bias": True, "num_key_value_heads": 4},
        {**SMALL, "moe_layers": [2], "num_hidden_layers": 3},
        # No size is a multiple of a page or of 64 bytes.
        {**SMALL, "hidden_size": 24, "intermediate_size": 7, "intermediate_size_mlp": 13, "vocab_size": 301},
    ],
    ids=["scout", "tied", "bias", "one-moe-layer", "odd"],
)
def test_every_shape(tmp_path: Path, cache: Path, shape: dict[str, Any]) -> None:
    folder = tmp_path / "model"
    write(folder, shape)
    weights, _ = load(folder, cache, torch.bfloat16)
    assert_same(weights, private(folder, torch.bfloat16))
    if shape.get("tie_word_embeddings"):
        assert weights.head is weights.embedding


def test_tensors_written_in_pieces(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "PIECE_BYTES", 1000)
    monkeypatch.setattr(packed_weights, "POPULATE_BYTES", 3 * PAGE)
    assert_same(load(folder, cache)[0], private(folder, torch.float32))


def test_experts_are_indexed_by_logical_number(folder: Path, cache: Path) -> None:
    layers = (((0,), (1,), (1, 0), (0,), (1,), (1,), (1,), (1,)), ((1,),) * 8)
    expert_map = ExpertMap(layers)
    for rank in (0, 1):
        weights, reports = load(folder, cache, torch.float32, expert_map, rank)
        assert_same(weights, private(folder, torch.float32, expert_map, rank))
        routed = [layer.mlp.routed for layer in weights.layers[1::2]]
        # All lie there: to gain one is a matter of these two lists.
        assert [len(experts.gate_up) for experts in routed] == [8, 8]
        assert all(experts.slots == experts.experts for experts in routed)
        needed = 4 * held_numel(packed_tensors(ModelConfig.from_folder(folder)), expert_map, rank)
        assert (reports[-1].read, reports[-1].total) == (needed, needed)
    assert routed[0].experts == [1, 2, 4, 5, 6, 7]


def test_no_bytes_are_copied_and_none_can_be_written(folder: Path, cache: Path) -> None:
    weights, _ = load(folder, cache)
    tensors = [tensor for name, tensor in named(weights) if isinstance(tensor, Tensor) and ".routed" not in name]
    maps = Path("/proc/self/maps").read_text().splitlines()
    (line,) = [line for line in maps if line.endswith(packs(cache)[0].name)]
    first, last = (int(end, 16) for end in line.split()[0].split("-"))
    assert line.split()[1] == "r--s"
    assert all(first <= tensor.data_ptr() < last for tensor in tensors)
    assert all((tensor.data_ptr() - first) % PAGE == 0 for tensor in tensors)


def test_a_pack_is_in_use_until_the_last_tensor_is_gone(folder: Path, cache: Path) -> None:
    weights, _ = load(folder, cache)
    (path,) = packs(cache)
    own = packed_loading.PackedCache(cache)
    tensor = weights.layers[2].attention.qkv
    expected = tensor.clone()
    del weights
    assert not own.remove(path)
    assert torch.equal(tensor, expected)
    del tensor
    assert own.remove(path)


@pytest.mark.parametrize("name", ["maverick", "scout"])
def test_the_same_tokens(name: str, request: pytest.FixtureRequest, cache: Path, exactness: Exactness) -> None:
    written: Written = request.getfixturevalue(name)
    weights, _ = load(written.folder, cache)
    ids = prompt(5, 90)
    outputs = []
    for given in (None, weights):
        local = LocalRank(engine_config(written.folder), weights=given)
        (output,) = local.generate([greedy(0, ids, 20)])
        outputs.append(output)
    assert outputs[0] == outputs[1]
    exactness.check(written.reference, ids, outputs[1], f"{name}, packed")


def test_progress_of_a_first_and_a_second_start(folder: Path, cache: Path) -> None:
    _, reports = load(folder, cache)
    sizes = [(report.packed, report.to_pack, report.read, report.total) for report in reports]
    assert sizes == sorted(sizes, key=lambda size: (size[0], size[2])), "numbers only grow"
    whole = sum(tensor.numel for tensor in packed_tensors(ModelConfig.from_folder(folder))) * 4
    assert sizes[-1] == (whole, whole, whole, whole)
    assert sizes[0] == (0, whole, 0, 0)
    _, reports = load(folder, cache)
    assert {(report.packed, report.to_pack, report.note) for report in reports} == {(0, 0, "")}
    assert (reports[-1].read, reports[-1].total) == (whole, whole)


def test_stopped_while_packing(folder: Path, cache: Path) -> None:
    model = ModelConfig.from_folder(folder)
    expert_map = ExpertMap.even(model.num_moe_layers, model.num_experts, [0])

    def stop(progress: LoadProgress) -> None:
        raise InterruptedError("stopped while loading")

    with pytest.raises(InterruptedError):
        rank_weights(
            EngineConfig(folder, weights_cache_dir=cache), model, expert_map, 0, torch.float32, CPU, report=stop
        )
    assert packs(cache) == [], "nothing is left"


# ---- which pack is whose -----------------------------------------------------------------------------------------


def fingerprint(folder: Path) -> str:
    return checkpoint_fingerprint(folder, packed_tensors(ModelConfig.from_folder(folder)))


def test_each_type_has_its_pack(folder: Path, cache: Path) -> None:
    for dtype in (*DTYPES, torch.float32):
        load(folder, cache, dtype)
    assert sorted(path.name.split("-")[1] for path in packs(cache)) == ["bfloat16", "float32"]


def test_what_changes_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    known = {fingerprint(folder)}

    def changed() -> bool:
        found = fingerprint(folder)
        is_new = found not in known
        known.add(found)
        return is_new

    assert not changed()
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert changed(), "time of change"
    content = path.read_bytes()
    path.write_bytes(content + bytes(1))
    os.utime(path, ns=(0, 0))
    assert changed(), "size"
    # Another checkpoint of the same size and, out of an archive, the same times.
    write(tmp_path / "other", SMALL, seed=1)
    path.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes() + bytes(1))
    os.utime(path, ns=(0, 0))
    assert changed(), "content"
    edit_config(folder, lambda raw: {**raw, "num_hidden_layers": 3, "moe_layers": [1]})
    assert changed(), "what config.json says of tensors"
    edit_config(folder, lambda raw: {**raw, "rope_theta": 1.0, "eos_token_id": 7})
    assert not changed(), "nothing of the tensors"


def test_a_changed_checkpoint_is_packed_anew(folder: Path, cache: Path) -> None:
    load(folder, cache)
    edit_tensors(folder, lambda tensors: {**tensors, "model.norm.weight": torch.full((64,), 3.0)})
    weights, reports = load(folder, cache)
    assert torch.equal(weights.norm, torch.full((64,), 3.0))
    assert reports[-1].packed
    assert len(packs(cache)) == 2, "the old one stays until its room is needed"


def test_a_moved_checkpoint_keeps_its_pack(folder: Path, cache: Path) -> None:
    load(folder, cache)
    moved = folder.rename(folder.parent / "moved")
    assert not load(moved, cache)[1][-1].packed


# ---- where there can be no pack ----------------------------------------------------------------------------------


def test_weights_need_not_be_shared(folder: Path, cache: Path) -> None:
    weights, reports = load(folder, cache, share_weights=False)
    assert_same(weights, private(folder, torch.float32))
    assert not cache.exists()
    assert (reports[-1].packed, reports[-1].note) == (0, "")


def test_a_folder_that_cannot_be(folder: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file")
    weights, reports = load(folder, cache)
    assert_same(weights, private(folder, torch.float32))
    note = reports[-1].note
    assert note.startswith(f"{cache}: cannot hold packed weights (")
    assert note.endswith("each rank keeps a copy of its weights instead of sharing them")
    assert "\n" not in note
    assert note in caplog.text


def test_a_bound_that_is_too_low(folder: Path, cache: Path) -> None:
    weights, reports = load(folder, cache, weights_cache_bytes=1000)
    assert_same(weights, private(folder, torch.float32))
    assert "exceeds the bound of 0.0 MB, weights_cache_bytes" in reports[-1].note
    assert packs(cache) == []


def test_a_read_only_folder_serves_what_it_has(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder, cache, torch.float32)
    # Root may write anywhere: what a read-only file system would answer is said for it.
    real_open = os.open

    def read_only(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_CREAT | os.O_RDWR | os.O_WRONLY) and str(path).startswith(str(cache)):
            raise OSError(30, "Read-only file system", str(path))
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(os, "utime", lambda *args, **kwargs: read_only(cache, os.O_WRONLY))
    weights, reports = load(folder, cache, torch.float32)
    assert reports[-1].note == ""
    assert_same(weights, private(folder, torch.float32))
    weights, reports = load(folder, cache, torch.bfloat16)
    assert reports[-1].note.startswith(f"{cache}: cannot hold packed weights (Read-only file system); each rank keeps")
    assert_same(weights, private(folder, torch.bfloat16))


def test_a_broken_checkpoint_is_the_users_fault(folder: Path, cache: Path) -> None:
    name = "model.layers.3.feed_forward.experts.down_proj"
    edit_tensors(folder, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(UserError, match=rf"tensor {name} is missing from the checkpoint; copy it again"):
        load(folder, cache)
    assert packs(cache) == []
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
        load(folder, cache)


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "magic", "another's"])
def test_a_damaged_pack_is_packed_again(
    folder: Path, cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    load(folder, cache)
    (path,) = packs(cache)
    content = path.read_bytes()
    if damage == "another's":
        load(folder, cache, torch.bfloat16)
        content = next(other for other in packs(cache) if other != path).read_bytes()
    elif damage == "cut":
        content = content[:-1]
    elif damage == "empty":
        content = b""
    else:
        place = 40 if damage == "header" else 3
        content = content[:place] + b"\xff" + content[place + 1 :]
    path.write_bytes(content)
    weights, reports = load(folder, cache)
    assert_same(weights, private(folder, torch.float32))
    assert reports[-1].packed
    assert f"{path} is damaged (" in caplog.text
    PackFile(path).close()
