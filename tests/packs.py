"""Small packed files, for tests of the folder they lie in."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workers.packed_cache import PackedCache
from workers.packed_file import Header, PackFile, Writer, pack_name, plan_header
from workers.packed_layout import PackedTensor

TENSORS = [PackedTensor("a", (10, 300), ()), PackedTensor("b", (7,), ()), PackedTensor("c", (2, 2000), ())]
BYTES = 4 * (3000 + 7 + 4000)


def header(number: int = 0) -> Header:
    return plan_header(TENSORS, "float32", f"{number:032x}", f"/models/{number}")


def name(number: int = 0) -> str:
    return pack_name(f"{number:032x}", "float32")


def content(tensor: PackedTensor) -> bytes:
    return bytes((ord(tensor.name) + place) % 251 for place in range(4 * tensor.numel))


def fill(writer: Writer, tick: Callable[[], None]) -> None:
    for tensor in TENSORS:
        data = content(tensor)
        for start in range(0, len(data), 5000):
            writer.write(tensor.name, memoryview(data[start : start + 5000]))
            tick()


def get(cache: PackedCache, number: int = 0, fill: Any = fill, report: Any = lambda done, total: None) -> PackFile:
    return cache.get(name(number), lambda: header(number), fill, report)


def put(cache: PackedCache, *numbers: int) -> list[Path]:
    """Packs nobody uses, the first used longest ago."""
    paths = []
    for age, number in enumerate(numbers):
        pack = get(cache, number)
        pack.close()
        os.utime(pack.path, (10**9 + age, 10**9 + age))
        paths.append(pack.path)
    return paths
