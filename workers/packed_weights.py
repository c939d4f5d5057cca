"""Weights out of a packed file: written once from a checkpoint, mapped by all ranks of a host without a copy."""

import ctypes
import errno
import mmap
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from workers.checkpoint import Checkpoint
from workers.expert_map import ExpertMap
from workers.model_config import ModelConfig
from workers.packed_file import PAGE, PackFile, Writer
from workers.packed_layout import PackedTensor, Source
from workers.weights import AttentionWeights, ExpertWeights, LayerWeights, MlpWeights, ModelWeights, MoeWeights

# Read from the checkpoint at a time where a tensor can be cut: what packing holds in memory beside one expert.
PIECE_BYTES = 64 * 2**20
MADV_POPULATE_READ = 22  # Linux 5.14; not in Python's mmap yet
POPULATE_BYTES = 16 * 2**20


def write_pack(
    writer: Writer, checkpoint: Checkpoint, tensors: list[PackedTensor], dtype: torch.dtype, tick: Callable[[], None]
) -> None:
    """Write every tensor as `dtype`; `tick` is called after each piece.

    Raises:
        UserError: a tensor is missing, truncated or of another shape than the configuration says.
        OSError: no space, or the disk failed.
    """
    for tensor in tensors:
        for source in tensor.sources:
            count = source.shape[0]
            # An expert is turned as a whole; anything else comes in runs of rows.
            row_bytes = max(1, tensor.numel // tensor.shape[0] * dtype.itemsize)
            step = 1 if source.is_turned else max(1, PIECE_BYTES // row_bytes)
            for start in range(0, count, step):
                piece = _read(checkpoint, source, start, min(count, start + step), dtype)
                writer.write(tensor.name, piece.flatten().view(torch.uint8).numpy().data)
                tick()


class Mapping:
    """A pack in memory, shared with every process that maps it, and locked as in use until its last tensor is gone.

    Tensors are read-only: writing to one ends the process.

    Raises:
        OSError: the file cannot be mapped.
    """

    def __init__(self, pack: PackFile) -> None:
        self._path, self._header = pack.path, pack.header
        # Keeps a copy of the file's descriptor, and with it the lock.
        self._map = mmap.mmap(pack.fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        pack.close()
        view = np.frombuffer(self._map, np.uint8)
        # torch warns of buffers that may not be written, which is the point of this one; ctypes does not say.
        self._buffer = (ctypes.c_char * len(view)).from_address(view.ctypes.data)
        self._buffer.keeps = view  # type: ignore[attr-defined]
        self._dtype = getattr(torch, pack.header.dtype)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the pack, where it lies."""
        entry = self._header.tensors[name]
        count = entry.nbytes // self._dtype.itemsize
        return torch.frombuffer(self._buffer, dtype=self._dtype, count=count, offset=entry.offset).view(entry.shape)

    def __contains__(self, name: str) -> bool:
        return name in self._header.tensors

    def populate(self, spans: list[tuple[int, int]], progress: Callable[[int, int], None]) -> None:
        """Bring the spans (offset, bytes) from the disk where they are not in memory yet, and into this process's page
        table, so that no step waits for either; `progress(bytes, bytes in all)` is called about every 16 MiB.

        Raises:
            RuntimeError: the disk failed.
        """
        total, done = sum(nbytes for _, nbytes in spans), 0
        progress(0, total)
        pieces = [
            (start, min(POPULATE_BYTES, offset + nbytes - start))
            for offset, nbytes in spans
            for start in range(offset, offset + nbytes, POPULATE_BYTES)
        ]
        for number, (_, nbytes) in enumerate(pieces):
            # The disk reads ahead while this one is mapped.
            for ahead in pieces[number + 1 if number else 0 : number + 3]:
                self._advise(mmap.MADV_WILLNEED, *ahead)
            self._advise(MADV_POPULATE_READ, *pieces[number])
            done += nbytes
            progress(done, total)

    def spans(
        self, tensors: list[PackedTensor], expert_map: ExpertMap, rank: int, before: ExpertMap | None = None
    ) -> list[tuple[int, int]]:
        """Offset and bytes of what `rank` reads: all but the routed experts, and of those the ones it holds. With
        `before`, the map it had: only what it has gained since."""
        spans: list[tuple[int, int]] = []
        for tensor in tensors:
            entry = self._header.tensors[tensor.name]
            if tensor.moe_layer < 0:
                if before is None:
                    spans.append((entry.offset, entry.nbytes))
                continue
            size = entry.nbytes // entry.shape[0]
            had = set(before.experts_of(tensor.moe_layer, rank)) if before is not None else set()
            for expert in expert_map.experts_of(tensor.moe_layer, rank):
                if expert in had:
                    continue
                start = entry.offset + expert * size
                if spans and sum(spans[-1]) == start:
                    spans[-1] = spans[-1][0], spans[-1][1] + size
                else:
                    spans.append((start, size))
        return spans

    def _advise(self, advice: int, offset: int, nbytes: int) -> None:
        first = offset // PAGE * PAGE
        try:
            self._map.madvise(advice, first, offset + nbytes - first)
        except OSError as error:
            # Older kernels do not know MADV_POPULATE_READ: pages then come as they are touched.
            if error.errno == errno.EFAULT:
                raise RuntimeError(
                    f"{self._path}: cannot be read from the disk; remove it with `caravan cache clean` and start again"
                ) from None


def mapped_weights(mapping: Mapping, model: ModelConfig, expert_map: ExpertMap, rank: int) -> ModelWeights:
    """The weights of `rank` as views of the mapping. Routed experts are all there, at their logical numbers; those that
    the expert map gives the rank are listed as held."""
    return _Views(mapping, model, expert_map, rank).weights()


class _Views:
    def __init__(self, mapping: Mapping, model: ModelConfig, expert_map: ExpertMap, rank: int) -> None:
        self._get = mapping.tensor
        self._mapping, self._model, self._expert_map, self._rank = mapping, model, expert_map, rank

    def weights(self) -> ModelWeights:
        embedding = self._get("embedding")
        layers = [self._layer(layer) for layer in range(self._model.num_layers)]
        head = self._get("head") if "head" in self._mapping else embedding
        return ModelWeights(embedding, layers, self._get("norm"), head)

    def _layer(self, layer: int) -> LayerWeights:
        get, prefix = self._get, f"layers.{layer}."
        has_bias = f"{prefix}qkv_bias" in self._mapping
        attention = AttentionWeights(
            qkv=get(prefix + "qkv"),
            qkv_bias=get(prefix + "qkv_bias") if has_bias else None,
            out=get(prefix + "out"),
            out_bias=get(prefix + "out_bias") if has_bias else None,
        )
        is_moe = layer in self._model.moe_layers
        return LayerWeights(
            attention_norm=get(prefix + "attention_norm"),
            attention=attention,
            mlp_norm=get(prefix + "mlp_norm"),
            mlp=self._moe(prefix, self._model.moe_layers.index(layer)) if is_moe else self._mlp(prefix),
        )

    def _mlp(self, prefix: str) -> MlpWeights:
        return MlpWeights(self._get(prefix + "gate_up"), self._get(prefix + "down"))

    def _moe(self, prefix: str, moe_layer: int) -> MoeWeights:
        held = self._expert_map.experts_of(moe_layer, self._rank)
        return MoeWeights(
            router=self._get(prefix + "router"),
            shared=self._mlp(prefix + "shared."),
            routed=ExpertWeights(
                held, list(held), self._get(prefix + "experts.gate_up"), self._get(prefix + "experts.down")
            ),
        )


def _read(checkpoint: Checkpoint, source: Source, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    if source.is_turned:
        return checkpoint.expert(source.name, start, source.shape, dtype).t().contiguous()
    return checkpoint.rows(source.name, start, stop, source.shape, dtype).contiguous()
