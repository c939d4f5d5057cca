"""What a fetched model's folder says of itself: once whole, `caravan-manifest.json`; before, a journal of whole files.

Both are put in place by renaming, and a file is entered only after it has been checked and is on the disk. So whatever
a kill leaves behind is either a whole model or known to be none.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

MANIFEST = "caravan-manifest.json"
JOURNAL = "caravan-journal.json"
PARTIAL_SUFFIX = ".partial"
VERSION = 1
CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class KeptFile:
    """A whole file."""

    size: int
    """Bytes."""
    sha256: str
    """64 hexadecimal digits."""


@dataclass(frozen=True)
class Manifest:
    source: str
    """As a user writes it, without a revision."""
    version: str
    """Commit, or digest of a listing."""
    total: int
    """Bytes of the whole model."""
    files: Mapping[str, KeptFile] = field(default_factory=dict)
    fetched: int = 0
    """Seconds since 1970 when it was whole; 0: it is not yet."""
    seen: Mapping[str, int] = field(default_factory=dict)
    """Of each revision under which it was asked for, when that last meant this version (seconds since 1970)."""

    def with_file(self, name: str, kept: KeptFile) -> "Manifest":
        return replace(self, files={**self.files, name: kept})


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest | None:
    """A folder's manifest or journal; None: there is none, or none that can be understood.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return parse_manifest((folder / name).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def parse_manifest(text: bytes) -> Manifest:
    """Raises ValueError: it is none."""
    try:
        raw: Any = json.loads(text)
        if raw["version"] != VERSION:
            raise ValueError(f"version {raw['version']}")
        files = {str(name): KeptFile(int(entry["size"]), str(entry["sha256"])) for name, entry in raw["files"].items()}
        if not all(re.fullmatch(r"[0-9a-f]{64}", kept.sha256) for kept in files.values()):
            raise ValueError("a file has no SHA-256")
        seen = {str(revision): int(when) for revision, when in raw["seen"].items()}
        return Manifest(str(raw["source"]), str(raw["model"]), int(raw["total"]), files, int(raw["fetched"]), seen)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(repr(error)) from None


def write_manifest(folder: Path, manifest: Manifest, name: str = MANIFEST) -> None:
    """Put it in place, on the disk.

    Raises:
        OSError: it cannot be written.
    """
    described = {
        "version": VERSION,
        "source": manifest.source,
        "model": manifest.version,
        "total": manifest.total,
        "fetched": manifest.fetched,
        "seen": dict(manifest.seen),
        "files": {name: {"size": kept.size, "sha256": kept.sha256} for name, kept in manifest.files.items()},
    }
    # One a process: two may note at once under which revision they saw a whole model.
    temporary = folder / f".{name}.{os.getpid()}"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(described, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder / name)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Have what was renamed in it on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def wrong_sizes(folder: Path, manifest: Manifest) -> list[str]:
    """Names of the files that are gone, or not as long as the manifest says: what every start checks."""
    wrong = []
    for name, kept in manifest.files.items():
        try:
            is_right = (folder / name).stat().st_size == kept.size
        except OSError:
            is_right = False
        if not is_right:
            wrong.append(name)
    return wrong


def is_whole(folder: Path) -> bool:
    """Is a whole model there, as far as sizes tell?

    Raises:
        OSError: the folder cannot be read.
    """
    manifest = read_manifest(folder)
    return manifest is not None and not wrong_sizes(folder, manifest)


def damaged_files(
    folder: Path, manifest: Manifest, progress: Callable[[int], None] = lambda count: None
) -> Iterator[str]:
    """Names of the files that are not what was fetched, every byte read; `progress(bytes)` is called for every chunk.

    Raises:
        OSError: one cannot be read.
    """
    for name, kept in manifest.files.items():
        digest = hashlib.sha256()
        try:
            with (folder / name).open("rb") as file:
                while piece := file.read(CHUNK_BYTES):
                    digest.update(piece)
                    progress(len(piece))
        except FileNotFoundError:
            pass
        if digest.hexdigest() != kept.sha256:
            yield name
