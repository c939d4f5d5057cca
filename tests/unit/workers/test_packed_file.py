"""The packed file: what is written lies there, and every damage is found."""

import os
import zlib
from itertools import pairwise
from pathlib import Path

import pytest

from tests.packs import TENSORS, content, get, name, put
from workers.packed_cache import PackedCache
from workers.packed_file import PAGE, PackDamagedError, PackFile, damaged_tensors, plan_header, read_header
from workers.packed_layout import PackedTensor


@pytest.fixture
def cache(tmp_path: Path) -> PackedCache:
    return PackedCache(tmp_path / "cache")


def test_what_is_written_is_what_lies_there(cache: PackedCache) -> None:
    pack = get(cache)
    assert pack.path == cache.folder / f"{name()}.pack"
    for tensor in TENSORS:
        entry = pack.header.tensors[tensor.name]
        assert entry.offset % PAGE == 0
        assert os.pread(pack.fd, entry.nbytes, entry.offset) == content(tensor)
    assert list(damaged_tensors(pack.fd, pack.header)) == []
    assert pack.path.stat().st_size == pack.header.file_bytes
    assert os.listdir(cache.folder) == [pack.path.name]
    pack.close()


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda tensor: tensor.name)
def test_a_changed_byte_is_found_where_it_is(cache: PackedCache, tensor: PackedTensor) -> None:
    (path,) = put(cache, 0)
    with path.open("r+b") as file:
        pack = PackFile(path)
        file.seek(pack.header.tensors[tensor.name].offset + 5)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 16]))
    assert list(damaged_tensors(pack.fd, pack.header)) == [tensor.name]
    pack.close()
    get(cache).close()  # a start does not read it all


@pytest.mark.parametrize("place", [0, 15, 16, 20, 24, 28, 100])
def test_every_byte_of_the_header_counts(cache: PackedCache, place: int) -> None:
    (path,) = put(cache, 0)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackDamagedError):
        PackFile(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "no packed file"),
        (b"caravan weights\n", "no packed file"),
        (b"caravan weights\n" + (10**9).to_bytes(8, "little") + bytes(4), "cut off"),
        (
            b"caravan weights\n" + (2).to_bytes(8, "little") + zlib.crc32(b"{}").to_bytes(4, "little") + b"{}",
            "understood",
        ),
    ],
)
def test_what_is_no_pack(tmp_path: Path, text: bytes, says: str) -> None:
    path = tmp_path / "x.pack"
    path.write_bytes(text)
    with path.open("rb") as file, pytest.raises(PackDamagedError, match=says):
        read_header(file.fileno())


def test_a_header_of_many_tensors_leaves_room_for_its_offsets() -> None:
    tensors = [PackedTensor(f"layers.{n}.weight", (n % 7 + 1, 1000), ()) for n in range(500)]
    planned = plan_header(tensors, "bfloat16", "f" * 32, "/x")
    first = min(entry.offset for entry in planned.tensors.values())
    assert len(planned.to_bytes()) <= first < len(planned.to_bytes()) + 500 * 16 + PAGE
    ends = sorted((entry.offset, entry.offset + entry.nbytes) for entry in planned.tensors.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
