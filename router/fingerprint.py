"""What is served, as one short string: equal where two servers would answer alike."""

import hashlib
import json
import os
import struct
from pathlib import Path

SAMPLES = 4
SAMPLE_BYTES = 1024
IGNORED_KEYS = frozenset({"_name_or_path", "transformers_version"})
"""Of config.json: they say where it came from, not what it does."""
MAX_HEADER_BYTES = 100 * 2**20


def checkpoint_digest(folder: Path, chat_template: str) -> str:
    """Digest of a checkpoint; empty when its weights cannot be read here.

    Weights count by every tensor's name, type and shape and by 4 samples of 1 KiB of its values: a fine-tuned
    checkpoint differs, one that differs in a few single values may not. How they are cut into files does not count.

    Args:
        folder: a Hugging Face checkpoint.
        chat_template: its chat template; empty where there is none.
    """
    digest = hashlib.sha256()
    try:
        files = sorted(folder.glob("*.safetensors"))
        tensors = sorted(entry for file in files for entry in _tensors(file))
        if not tensors:
            return ""
        for name, described in tensors:
            _add(digest, name.encode(), described)
        for file_name in ("config.json", "generation_config.json"):
            _add(digest, _settings(folder / file_name))
        tokenizer = folder / "tokenizer.json"
        _add(digest, tokenizer.read_bytes() if tokenizer.is_file() else b"")
    except (OSError, ValueError, struct.error, KeyError, TypeError):
        return ""
    _add(digest, chat_template.encode())
    return digest.hexdigest()


def fingerprint(digest: str, dtype: str) -> str:
    """Of a checkpoint computed in `dtype`: 64 hexadecimal digits; empty where the digest is.

    Args:
        digest: from checkpoint_digest.
        dtype: "float32" or "bfloat16".
    """
    return hashlib.sha256(f"{digest} {dtype}".encode()).hexdigest() if digest else ""


def _tensors(file: Path) -> list[tuple[str, bytes]]:
    """Name and description of every tensor in a safetensors file: type, shape, samples."""
    with file.open("rb", buffering=0) as stream:
        (size,) = struct.unpack("<Q", os.pread(stream.fileno(), 8, 0))
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"{file} has no safetensors header")
        header = json.loads(os.pread(stream.fileno(), size, 8))
        found = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            samples = hashlib.sha256()
            for i in range(SAMPLES):
                place = start + (end - start) * i // SAMPLES
                samples.update(os.pread(stream.fileno(), min(SAMPLE_BYTES, end - place), 8 + size + place))
            described = json.dumps([entry["dtype"], entry["shape"], samples.hexdigest()])
            found.append((name, described.encode()))
    return found


def _settings(path: Path) -> bytes:
    if not path.is_file():
        return b""
    settings = json.loads(path.read_bytes())
    return json.dumps({k: v for k, v in settings.items() if k not in IGNORED_KEYS}, sort_keys=True).encode()


def _add(digest: "hashlib._Hash", *parts: bytes) -> None:
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
