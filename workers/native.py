"""The CPU kernels as Python sees them: one function a kind of layer, over tensors.

Each is checked against its eager twin in tests. The structures repeat those of kernels/*.h field by field.
Shape suffixes as in the eager layers: T rows, S received rows, X hidden size, E experts, V vocabulary.
"""

import ctypes
from ctypes import c_double, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from workers.kernels.build import load_kernels
from workers.model_config import ModelConfig
from workers.paged_rows import PagedRows
from workers.weights import AttentionWeights, ExpertWeights, MlpWeights

_SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_MAX_HEAD_DIM = 256


def supports(config: ModelConfig, dtype: torch.dtype) -> bool:
    return dtype in _SUFFIXES and config.head_dim <= _MAX_HEAD_DIM


class _AttentionLayer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("norm", "qkv", "qkv_bias", "out", "out_bias", "keys", "values")),
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "block_size", "has_qk_norm")),
        ("eps", c_double),
    )


class _AttentionRows(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("rows", "table_width")),
        *((name, c_void_p) for name in ("slot", "position", "first", "sequence", "first_block", "tables")),
        *((name, c_void_p) for name in ("cos", "sin", "temperature")),
    )


class _DenseLayer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("norm", "gate_up", "down")),
        *((name, c_int64) for name in ("hidden", "inner")),
        ("eps", c_double),
    )


class _RouterLayer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("norm", "router")),
        *((name, c_int64) for name in ("hidden", "experts", "top_k")),
        ("eps", c_double),
    )


class _ExpertLayer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("gate_up", "down", "slot", "tokens")),
        *((name, c_int64) for name in ("experts", "hidden", "inner")),
    )


class Kernels:
    """The library for one element type, with the memory its calls work in. For one thread at a time.

    Raises:
        KernelError: it cannot be compiled or loaded here.
    """

    def __init__(self, dtype: torch.dtype, threads: int) -> None:
        library = load_kernels()
        self.dtype, self.threads = dtype, threads
        self.attention = self._function(library, "attention", c_int64)
        self.dense = self._function(library, "dense", c_int64)
        self.route = self._function(library, "route", c_int64)
        self.experts = self._function(library, "experts", c_int64)
        self.norm = self._function(library, "norm", None)
        self.logits = self._function(library, "logits", None)
        self._scratch = torch.empty(1 << 16, dtype=torch.uint8)

    def _function(self, library: ctypes.CDLL, name: str, result: Any) -> Any:
        function = getattr(library, f"{name}_{_SUFFIXES[self.dtype]}")
        function.restype = result
        return function

    def run(self, kernel: Any, *arguments: Any) -> int:
        """Call a kernel that works in scratch memory, of which it says itself how much it takes."""
        size = kernel(*arguments, None, 0)
        if size > self._scratch.numel():
            self._scratch = torch.empty(size * 3 // 2, dtype=torch.uint8)
        result: int = kernel(*arguments, c_void_p(self._scratch.data_ptr()), c_int(self.threads))
        return result


def _pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous(), "kernels read rows in one run"
    return tensor.data_ptr()


class StepRows:
    """`PagedRows` with what depends on positions, as the attention kernel takes them. Keeps the tensors alive."""

    def __init__(
        self, rows: PagedRows, cos_TD: Tensor | None = None, sin_TD: Tensor | None = None, temp_T: Tensor | None = None
    ) -> None:
        self._keep = (rows, cos_TD, sin_TD, temp_T)
        self.struct = _AttentionRows(
            len(rows.slot_T),
            rows.tables_SM.shape[1],
            *(array.ctypes.data for array in (rows.slot_T, rows.position_T, rows.first_T, rows.sequence_T)),
            *(array.ctypes.data for array in (rows.first_block_S, rows.tables_SM)),
            *(_pointer(tensor) for tensor in (cos_TD, sin_TD, temp_T)),
        )


class NativeAttention:
    """x += attention(norm(x)), in place."""

    def __init__(
        self, kernels: Kernels, config: ModelConfig, norm: Tensor, w: AttentionWeights, cache: tuple[Tensor, Tensor]
    ) -> None:
        self._keep = (norm, w, cache)
        self._kernels = kernels
        pointers = (_pointer(t) for t in (norm, w.qkv, w.qkv_bias, w.out, w.out_bias, *cache))
        self._layer = _AttentionLayer(
            *pointers,
            *(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim),
            *(cache[0].shape[1], config.use_qk_norm, config.rms_norm_eps),
        )

    def __call__(self, x_TX: Tensor, rows: StepRows) -> None:
        k, layer, step = self._kernels, ctypes.byref(self._layer), ctypes.byref(rows.struct)
        k.run(k.attention, layer, step, c_void_p(x_TX.data_ptr()))


class NativeDense:
    """x += mlp(norm(x)), or x += mlp(normed) + Σ routed, in place."""

    def __init__(self, kernels: Kernels, norm: Tensor, weights: MlpWeights, eps: float) -> None:
        self._keep = (norm, weights)
        self._kernels = kernels
        hidden, inner = weights.down.shape
        self._layer = _DenseLayer(*(_pointer(t) for t in (norm, weights.gate_up, weights.down)), hidden, inner, eps)

    def __call__(self, x_TX: Tensor, normed_TX: Tensor | None = None, routed_RX: Tensor | None = None) -> None:
        k, layer, rows = self._kernels, ctypes.byref(self._layer), len(x_TX)
        top_k = c_int64(len(routed_RX) // max(1, rows) if routed_RX is not None else 0)
        tensors = [c_void_p(_pointer(t)) for t in (normed_TX, routed_RX)]
        k.run(k.dense, layer, c_int64(rows), *tensors, top_k, c_void_p(x_TX.data_ptr()))


class NativeRouter:
    """(norm(x), [R, X] rows times their scores, [R] experts) of each row's top experts."""

    def __init__(self, kernels: Kernels, norm: Tensor, router_EX: Tensor, top_k: int, eps: float) -> None:
        self._keep = (norm, router_EX)
        self._kernels, self._top_k = kernels, top_k
        experts, hidden = router_EX.shape
        self._layer = _RouterLayer(_pointer(norm), _pointer(router_EX), hidden, experts, top_k, eps)

    def __call__(self, x_TX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, layer, rows = self._kernels, ctypes.byref(self._layer), len(x_TX)
        normed_TX = torch.empty_like(x_TX)
        scaled_RX = x_TX.new_empty(rows * self._top_k, x_TX.shape[1])
        expert_R = torch.empty(rows * self._top_k, dtype=torch.int64)
        tensors = [c_void_p(t.data_ptr()) for t in (x_TX, normed_TX, scaled_RX, expert_R)]
        k.run(k.route, layer, c_int64(rows), *tensors)
        return normed_TX, scaled_RX, expert_R


class NativeExperts:
    """The routed experts of one layer that are here, like `RoutedExperts`."""

    def __init__(self, kernels: Kernels, weights: ExpertWeights, num_experts: int) -> None:
        self._slot_E = torch.full((num_experts,), -1, dtype=torch.int64)
        self._slot_E[weights.experts] = torch.tensor(weights.slots, dtype=torch.int64)
        self.tokens_E = torch.zeros(num_experts, dtype=torch.int64)
        self._keep, self._kernels = weights, kernels
        hidden, inner = weights.down.shape[1:]
        pointers = (_pointer(t) for t in (weights.gate_up, weights.down, self._slot_E, self.tokens_E))
        self._layer = _ExpertLayer(*pointers, num_experts, hidden, inner)

    def __call__(self, x_SX: Tensor, expert_S: Tensor) -> Tensor:
        """Each row through its expert; [S, X].

        Raises:
            RuntimeError: a row for an expert that is not here; computing it anyway would be silently wrong.
        """
        if not len(x_SX):
            return x_SX
        k, layer, rows = self._kernels, ctypes.byref(self._layer), len(x_SX)
        y_SX = torch.empty_like(x_SX)
        tensors = [c_void_p(_pointer(t)) for t in (x_SX, expert_S, y_SX)]
        missing = k.run(k.experts, layer, c_int64(rows), *tensors)
        if missing >= 0:
            raise RuntimeError(f"rows arrived for expert {missing}, which this rank does not hold")
        return y_SX


class NativeHead:
    """Final norm and logits."""

    def __init__(self, kernels: Kernels, norm: Tensor, head_VX: Tensor, eps: float) -> None:
        self._kernels, self._norm, self._head, self._eps = kernels, norm, head_VX, eps

    def norm(self, x_TX: Tensor) -> Tensor:
        to_TX = torch.empty_like(x_TX)
        rows, hidden = x_TX.shape
        pointers = [c_void_p(_pointer(t)) for t in (x_TX, self._norm)]
        self._kernels.norm(*pointers, c_double(self._eps), c_int64(rows), c_int64(hidden), c_void_p(to_TX.data_ptr()))
        return to_TX

    def logits(self, hidden_TX: Tensor) -> Tensor:
        """[T, V] float32."""
        vocabulary, hidden = self._head.shape
        to_TV = torch.empty(len(hidden_TX), vocabulary)
        pointers = [c_void_p(_pointer(t)) for t in (hidden_TX, self._head)]
        sizes = [c_int64(n) for n in (len(hidden_TX), vocabulary, hidden)]
        self._kernels.logits(*pointers, *sizes, c_void_p(to_TV.data_ptr()), c_int(self._kernels.threads))
        return to_TV
