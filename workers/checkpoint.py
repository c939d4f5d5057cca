"""Tensors of a Hugging Face checkpoint, one by one or one expert at a time: a rank reads only what it needs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.errors import UserError

INDEX = "model.safetensors.index.json"
# Multimodal checkpoints nest the text model under this; text-only ones do not.
PREFIX = "language_model."


class Checkpoint:
    """One or many safetensors files in a folder, with or without an index.

    `bytes_read` counts the bytes of every tensor or slice handed out, in the checkpoint's own type.

    Raises:
        UserError: no safetensors, a file that is missing, truncated or no safetensors, a tensor that is missing or
            has another shape. The sentence names the file and the tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._open: dict[Path, Any] = {}
        self._files = self._find()

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The whole tensor `name` of `shape`, as `dtype`."""
        return self._read(name, tuple(shape), None).to(dtype)

    def rows(self, name: str, start: int, stop: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Rows `start` to `stop` of the tensor `name`; `shape` is the whole one's."""
        return self._read(name, tuple(shape), slice(start, stop)).to(dtype)

    def expert(self, name: str, expert: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Row `expert` of the fused tensor `name`; `shape` is the fused one, [experts, …]."""
        return self._read(name, tuple(shape), expert).to(dtype)

    def item_bytes(self, name: str) -> int:
        """Bytes of one element of the tensor `name` in the checkpoint."""
        return _ITEM_BYTES.get(self._slice(name).get_dtype(), 2)

    def _read(self, name: str, shape: tuple[int, ...], row: int | slice | None) -> Tensor:
        view = self._slice(name)
        if tuple(view.get_shape()) != shape:
            raise UserError(
                f"{self._files[name]}: tensor {name} has shape {list(view.get_shape())}, "
                f"config.json says {list(shape)}; the checkpoint and its configuration do not belong together"
            )
        try:
            tensor: Tensor = view[:] if row is None else view[row]
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self._files[name]}: tensor {name} cannot be read ({error}); copy the file again"
            ) from None
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def _slice(self, name: str) -> Any:
        path = self._files.get(name)
        if path is None:
            raise UserError(f"{self.folder}: tensor {name} is missing from the checkpoint; copy it again")
        handle = self._handle(path)
        for stored in (name, PREFIX + name):
            if stored in self._stored[path]:
                return handle.get_slice(stored)
        raise UserError(f"{path}: tensor {name} is missing, though {INDEX} says it is there; copy the file again")

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = _open_file(path)
            self._stored[path] = set(self._open[path].keys())
        return self._open[path]

    def _find(self) -> dict[str, Path]:
        self._stored: dict[Path, set[str]] = {}
        if (index := self.folder / INDEX).exists():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {name.removeprefix(PREFIX): self.folder / file for name, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index}: is no index of safetensors files ({error!r}); copy it again") from None
        paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise UserError(f"{self.folder}: holds no *.safetensors; give the folder of a Hugging Face checkpoint")
        files: dict[str, Path] = {}
        for path in paths:
            self._handle(path)
            files.update({name.removeprefix(PREFIX): path for name in self._stored[path]})
        return files


_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "F8_E4M3": 1}


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though {INDEX} names it; copy the checkpoint again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is truncated or no safetensors file ({error}); copy it again") from None
