"""The CPU kernels against their eager twins, and against themselves in other batches."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.exactness import Written
from tests.local_engine import LocalRank, engine_config, greedy, prompt
from workers.errors import UserError
from workers.kernels import build
from workers.layers import mlp, rms_norm
from workers.native import Kernels, NativeAttention, NativeDense, NativeExperts, NativeHead, NativeRouter, StepRows
from workers.native_model import NativeLlama4
from workers.paged_rows import PagedRows
from workers.weights import AttentionWeights, ExpertWeights, MlpWeights

if not any(map(shutil.which, build.COMPILERS)):
    pytest.skip("no C++ compiler on this host: ranks compute in torch's operators", allow_module_level=True)

TYPES = (torch.float32, torch.bfloat16)
SIZES = st.integers(1, 70)
# Of the largest result: summed in another order, and in bfloat16 rounded again.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def randoms(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == expected.shape
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    assert torch.allclose(got.float(), expected.float(), rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", TYPES)
@given(tokens=st.integers(1, 20), hidden=SIZES, inner=SIZES, threads=st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_dense(dtype: torch.dtype, tokens: int, hidden: int, inner: int, threads: int) -> None:
    norm = randoms(1, hidden, dtype=dtype)
    weights = MlpWeights(
        randoms(2, 2 * inner, hidden, dtype=dtype) / hidden**0.5, randoms(3, hidden, inner, dtype=dtype) / inner**0.5
    )
    x = randoms(4, tokens, hidden, dtype=dtype)
    expected = x + mlp(rms_norm(x, norm, 1e-5), weights)
    layer = NativeDense(Kernels(dtype, threads), norm, weights, 1e-5)
    got = x.clone()
    layer(got)
    assert_close(got, expected, dtype)
    routed = randoms(5, 2 * tokens, hidden, dtype=dtype)
    got = x.clone()
    layer(got, rms_norm(x, norm, 1e-5), routed)
    assert_close(got, expected + routed.view(tokens, 2, hidden).sum(1), dtype)


@pytest.mark.parametrize("dtype", TYPES)
@given(tokens=st.integers(1, 20), hidden=SIZES, experts=st.integers(2, 40), top_k=st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_router(dtype: torch.dtype, tokens: int, hidden: int, experts: int, top_k: int) -> None:
    norm, router = randoms(1, hidden, dtype=dtype), randoms(2, experts, hidden, dtype=dtype)
    x = randoms(3, tokens, hidden, dtype=dtype)
    normed, scaled, expert = NativeRouter(Kernels(dtype, 1), norm, router, top_k, 1e-5)(x)
    assert_close(normed, rms_norm(x, norm, 1e-5), dtype)
    logits = torch.nn.functional.linear(normed, router)
    chosen = expert.view(tokens, top_k)
    assert all(len(set(row)) == top_k for row in chosen.tolist())
    # By value: equal logits may be taken in any order, and nearly equal ones fall where rounding lets them.
    values = logits.gather(1, chosen).float()
    assert_close(values, torch.topk(logits, top_k).values.float(), dtype)
    scores = torch.sigmoid(values).to(dtype)
    assert_close(scaled, (normed[:, None] * scores[:, :, None]).flatten(0, 1), dtype)


def expert_weights(dtype: torch.dtype, hidden: int, inner: int, experts: list[int]) -> ExpertWeights:
    count = len(experts)
    return ExpertWeights(
        experts,
        list(range(count)),
        randoms(2, count, 2 * inner, hidden, dtype=dtype) / hidden**0.5,
        randoms(3, count, hidden, inner, dtype=dtype) / inner**0.5,
    )


@pytest.mark.parametrize("dtype", TYPES)
@given(
    rows=st.lists(st.sampled_from([0, 2, 5]), min_size=1, max_size=40),
    hidden=SIZES,
    inner=st.integers(1, 100),
    threads=st.integers(1, 2),
)
@settings(max_examples=60, deadline=None)
def test_experts(dtype: torch.dtype, rows: list[int], hidden: int, inner: int, threads: int) -> None:
    weights = expert_weights(dtype, hidden, inner, [0, 2, 5])
    layer = NativeExperts(Kernels(dtype, threads), weights, 7)
    x, expert = randoms(1, len(rows), hidden, dtype=dtype), torch.tensor(rows)
    got = layer(x, expert)
    for number, (row, result) in enumerate(zip(x, got, strict=True)):
        slot = weights.experts.index(rows[number])
        expected = mlp(row[None], MlpWeights(weights.gate_up[slot], weights.down[slot]))[0]
        assert_close(result, expected, dtype)
        # Alone it is the same to the last bit.
        assert torch.equal(result, layer(row[None], expert[number : number + 1])[0])
    counted = torch.bincount(expert, minlength=7) * 2
    assert torch.equal(layer.tokens_E, counted)


def test_a_row_for_an_expert_that_is_not_here() -> None:
    layer = NativeExperts(Kernels(torch.float32, 1), expert_weights(torch.float32, 8, 5, [1, 3]), 6)
    with pytest.raises(RuntimeError, match="expert 4, which this rank does not hold"):
        layer(torch.ones(2, 8), torch.tensor([3, 4]))
    assert layer(torch.ones(0, 8), torch.empty(0, dtype=torch.int64)).shape == (0, 8)


@pytest.mark.parametrize("dtype", TYPES)
@given(tokens=st.integers(1, 15), hidden=SIZES, vocabulary=st.integers(1, 90))
@settings(max_examples=40, deadline=None)
def test_head(dtype: torch.dtype, tokens: int, hidden: int, vocabulary: int) -> None:
    norm, head = randoms(1, hidden, dtype=dtype), randoms(2, vocabulary, hidden, dtype=dtype)
    native = NativeHead(Kernels(dtype, 1), norm, head, 1e-5)
    normed = native.norm(randoms(3, tokens, hidden, dtype=dtype))
    assert_close(normed, rms_norm(randoms(3, tokens, hidden, dtype=dtype), norm, 1e-5), dtype)
    assert_close(native.logits(normed), normed.float() @ head.float().T, dtype)


# ---- attention -----------------------------------------------------------------------------------------------------


class PagedAttention:
    """One attention layer over a pool that is full of keys. Steps are (first position, rows) of each sequence.

    Every sequence has `length` positions, in blocks anywhere in the pool.
    """

    hidden = 24

    def __init__(
        self, dtype: torch.dtype, kv_heads: int, group: int, dim: int, block_size: int, chunk: int, length: int
    ) -> None:
        self.dtype, self.kv_heads, self.group, self.dim = dtype, kv_heads, group, dim
        self.block_size, self.chunk = block_size, chunk
        blocks, heads, sequences = -(-length // block_size), kv_heads * group, 3
        order = torch.randperm(blocks * sequences, generator=torch.Generator().manual_seed(7)).numpy()
        self.tables_SM = order.astype(np.int32).reshape(sequences, blocks)
        self.weights = AttentionWeights(
            randoms(2, (heads + 2 * kv_heads) * dim, self.hidden, dtype=dtype) / 4,
            None,
            randoms(3, self.hidden, heads * dim, dtype=dtype) / (heads * dim) ** 0.5,
            None,
        )
        pool = (blocks * sequences, block_size, kv_heads, dim)
        self.pool = (randoms(4, *pool, dtype=dtype), randoms(5, *pool, dtype=dtype))
        self.x = randoms(6, sequences, length, self.hidden, dtype=dtype)
        self.norm = torch.ones(self.hidden, dtype=dtype)

    def __call__(self, steps: dict[int, range], threads: int = 1) -> dict[int, Tensor]:
        """Of each sequence, its rows' results. The pool that is left has the step's keys."""
        sequence_T = np.concatenate([np.full(len(run), number) for number, run in steps.items()]).astype(np.int64)
        position_T = np.concatenate([np.array(run) for run in steps.values()]).astype(np.int64)
        size = self.block_size
        slot_T = self.tables_SM[sequence_T, position_T // size].astype(np.int64) * size + position_T % size
        first_T = position_T // self.chunk * self.chunk if self.chunk else np.zeros_like(position_T)
        rows = PagedRows(slot_T, position_T, first_T, sequence_T, np.zeros(3, dtype=np.int64), self.tables_SM)
        config = SimpleNamespace(
            hidden_size=self.hidden,
            num_heads=self.kv_heads * self.group,
            num_kv_heads=self.kv_heads,
            head_dim=self.dim,
            use_qk_norm=False,
            rms_norm_eps=1e-5,
        )
        layer = NativeAttention(Kernels(self.dtype, threads), config, self.norm, self.weights, self.pool)
        x = torch.cat([self.x[number, run.start : run.stop] for number, run in steps.items()])
        layer(x, StepRows(rows))
        return dict(zip(steps, x.split([len(run) for run in steps.values()]), strict=True))

    def expected(self, sequence: int, position: int) -> Tensor:
        """In float64 from the pool, but for the roundings between the parts."""
        heads, dtype, size = self.kv_heads * self.group, self.dtype, self.block_size
        x = self.x[sequence, position]
        normed = rms_norm(x[None], self.norm, 1e-5)[0].double()
        q = (self.weights.qkv[: heads * self.dim].double() @ normed).to(dtype).double().view(heads, self.dim)
        seen = np.arange(position // self.chunk * self.chunk if self.chunk else 0, position + 1)
        slots = torch.from_numpy(self.tables_SM[sequence, seen // size].astype(np.int64) * size + seen % size)
        k, v = (pool.flatten(0, 1)[slots].double().repeat_interleave(self.group, 1) for pool in self.pool)
        weight = torch.softmax(torch.einsum("hd,khd->hk", q, k) / self.dim**0.5, dim=1)
        attended = torch.einsum("hk,khd->hd", weight, v).flatten().to(dtype)
        return (x.double() + self.weights.out.double() @ attended.double()).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@given(
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3, 4, 5, 7, 70]),
    dim=st.sampled_from([5, 16, 40, 64, 96, 128, 256]),
    block_size=st.sampled_from([1, 5, 16, 24, 100]),
    chunk=st.sampled_from([0, 0, 7, 70, 128]),
    start=st.integers(0, 140),
    rows=st.integers(1, 70),
    single=st.integers(0, 200),
    threads=st.integers(2, 5),
)
@settings(max_examples=60, deadline=None)
def test_a_row_attends_alone_as_in_a_run(
    dtype: torch.dtype,
    kv_heads: int,
    group: int,
    dim: int,
    block_size: int,
    chunk: int,
    start: int,
    rows: int,
    single: int,
    threads: int,
) -> None:
    """To the last bit, whatever the walk it shares, and right."""
    attention = PagedAttention(dtype, kv_heads, group, dim, block_size, chunk, 210)
    run = range(start, start + rows)
    steps = {2: range(single, single + 1), 0: run, 1: range(single, min(single + 3, 210))}
    together = attention(steps)
    for number, result in attention(steps, threads).items():
        assert torch.equal(result, together[number])
    halves = [attention({0: half})[0] for half in (run[: rows // 2], run[rows // 2 :]) if half]
    assert torch.equal(torch.cat(halves), together[0])
    for position in {start, start + rows // 3, start + rows - 1}:
        assert torch.equal(attention({0: range(position, position + 1)})[0][0], together[0][position - start])
        assert_close(together[0][position - start], attention.expected(0, position), dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group", [1, 4])
def test_a_row_takes_nothing_from_those_behind_it(dtype: torch.dtype, group: int) -> None:
    """Not even what is no number: of a pair of keys whose second it does not see, and of blocks that nobody wrote."""
    attention = PagedAttention(dtype, 2, group, 64, 16, 0, 210)
    before = attention({0: range(50, 80)})[0]
    attention.x[0, 71:] = float("nan")
    after = attention({0: range(50, 80)})[0]
    assert torch.equal(after[:21], before[:21])
    assert after[21:].isnan().all()
    slots = torch.from_numpy(attention.tables_SM[0, 71 // 16 :].astype(np.int64))
    for pool in attention.pool:
        pool[slots[0], 71 % 16 :] = float("nan")
        pool[slots[1:]] = float("nan")
    assert torch.equal(attention({0: range(70, 71)})[0][0], before[20])


# ---- whole models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["maverick", "scout"])
@pytest.mark.parametrize("block_size", [1, 5, 16, 24])
def test_logits_are_those_of_the_eager_model(name: str, block_size: int, request: pytest.FixtureRequest) -> None:
    """Prompts that cross chunks, in steps that cut them anywhere, beside sequences that decode."""
    folder = request.getfixturevalue(name).folder
    logits = []
    for kernels in ("native", "eager"):
        rank = LocalRank(engine_config(folder, kernels=kernels, block_size=block_size, max_num_batched_tokens=23))
        assert isinstance(rank.runner.model, NativeLlama4) == (kernels == "native")
        logits.append(rank.all_logits([greedy(n, prompt(n, 3 + 29 * n), 12) for n in range(4)]))
    for native, eager in zip(*logits, strict=True):
        assert torch.allclose(native, eager, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_mates_change_no_bit(maverick: Written, dtype: str) -> None:
    """Logits of a sequence are the same alone and in company, in steps of any size, on one thread and on two."""

    def logits(sequences: list[int], budget: int, threads: int) -> dict[int, Tensor]:
        torch.set_num_threads(threads)
        config = engine_config(maverick.folder, dtype=dtype, kernels="native", max_num_batched_tokens=budget)
        rank = LocalRank(config)
        torch.set_num_threads(1)
        asked = [greedy(n, prompt(n, 5 + 31 * n), 6) for n in sequences]
        return dict(zip(sequences, rank.all_logits(asked), strict=True))

    together = logits([0, 1, 2, 3, 4], 64, 1)
    for other in (logits([0, 1, 2, 3, 4], 17, 1), logits([0, 1, 2, 3, 4], 64, 2), logits([3], 16, 1)):
        assert all(torch.equal(together[number], rows) for number, rows in other.items())


# ---- building ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "COMPILERS", ("caravan-has-no-such-compiler",))
    build.load_kernels.cache_clear()
    yield
    build.load_kernels.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_it_computes_in_torch_and_says_so(
    maverick: Written, caplog: pytest.LogCaptureFixture
) -> None:
    rank = LocalRank(engine_config(maverick.folder, kernels="auto"))
    assert not isinstance(rank.runner.model, NativeLlama4)
    assert "no C++ compiler" in caplog.text
    with pytest.raises(UserError, match=r"kernels: native are asked for, but no C\+\+ compiler"):
        LocalRank(engine_config(maverick.folder, kernels="native"))


def test_compiled_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = build._compiled(build.default_cache())
    cache = tmp_path / "cache"
    cache.mkdir()
    shutil.copy(compiled, cache / compiled.name)
    monkeypatch.setattr(build, "_run", lambda command: pytest.fail(f"compiled again: {command}"))
    assert build._compiled(cache) == cache / compiled.name


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", ("--no-such-flag",))
    with pytest.raises(build.KernelError, match=r"cannot compile the kernels: .*no-such-flag"):
        build._compiled(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(build.KernelError, match=r"cannot be written .*XDG_CACHE_HOME"):
        build._compiled(tmp_path / "file" / "cache")
