"""Is it the same model on two hosts? Told by what a checkpoint holds, not by when or where; no torch here."""

import hashlib
import json
import os
from fnmatch import fnmatchcase
from pathlib import Path

from workers.checkpoint_check import checkpoint_files, read_header
from workers.errors import UserError
from workers.remote import SETTINGS

FILE_SAMPLES = 64
TENSOR_SAMPLES = 2
SAMPLE_BYTES = 4096


def content_fingerprint(folder: Path) -> str:
    """64 hexadecimal digits, equal where two folders hold the same model, on whatever hosts.

    They cover every byte of config.json, generation_config.json, tokenizer* and chat_template*, and of every file of
    weights its name, its size, its header (names, types, shapes and places of all tensors), 64 samples of 4 KiB at even
    distances and two of each tensor. So another tokenizer, another configuration, another training run, files cut
    otherwise, and a file with a hole give another fingerprint; single values changed between samples do not. Times of
    change and what else lies in the folder do not count. It takes milliseconds to seconds.

    Raises:
        UserError: a file is missing, truncated or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for path in sorted(folder.iterdir(), key=lambda path: path.name):
            if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in SETTINGS):
                _add(digest, path.name.encode(), path.read_bytes())
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror})") from None
    for path in sorted(checkpoint_files(folder), key=lambda path: path.name):
        tensors = read_header(path)
        try:
            _add_weights(digest, path, [tuple(entry["data_offsets"]) for entry in tensors.values()])
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _add_weights(digest: "hashlib._Hash", path: Path, tensors: list[tuple[int, int]]) -> None:
    with path.open("rb", buffering=0) as file:
        fd = file.fileno()
        size = os.fstat(fd).st_size
        data = 8 + int.from_bytes(os.pread(fd, 8, 0), "little")
        _add(digest, path.name.encode(), json.dumps(size).encode(), os.pread(fd, data, 0))
        places = [size * number // FILE_SAMPLES for number in range(FILE_SAMPLES)]
        for start, end in tensors:
            places += [data + start + (end - start) * number // TENSOR_SAMPLES for number in range(TENSOR_SAMPLES)]
        for place in sorted(set(places)):
            digest.update(os.pread(fd, SAMPLE_BYTES, place))


def _add(digest: "hashlib._Hash", *parts: bytes) -> None:
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
