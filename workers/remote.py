"""What a place that models are fetched from must be able to do, and how it fails. The places are in `hub_remote.py`
and `url_remote.py`."""

import hashlib
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

INDEX = "model.safetensors.index.json"
SETTINGS = ("config.json", "generation_config.json", "tokenizer*", "chat_template*")
"""All that serving needs beside the weights."""
WEIGHTS = "*.safetensors"


class FetchError(RuntimeError):
    """A model cannot be fetched now, for a reason that may pass. One sentence."""


class TransientError(Exception):
    """One try failed; another may not. A phrase that follows a colon."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        """Seconds the other side asked to be left alone; 0: it did not say."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a model."""

    name: str
    """Without a folder."""
    size: int
    """Bytes."""
    checksum: str = ""
    """What the place says of its content, "KIND:HEX", of kinds "sha256", "md5" and "git-sha1"; empty: nothing."""


@dataclass(frozen=True)
class Listing:
    """What a model is made of now."""

    version: str
    """Another one for another content: a commit, or a digest of what the place says of its files."""
    files: tuple[RemoteFile, ...]


class Remote(Protocol):
    """A place that holds one model. Calls may come from several threads at once."""

    def listing(self) -> Listing:
        """All that serving may need.

        Raises:
            UserError: there is no such model, or this user may not see it.
            TransientError, FetchError: the place does not answer as it should.
        """
        ...

    def read(self, version: str, file: RemoteFile, start: int) -> Generator[bytes, None, None]:
        """Content of a file from byte `start` on, to its end or some way towards it; closing it ends the transfer.

        Raises:
            As `listing`.
        """
        ...


def needed_files(files: Sequence[RemoteFile], shards: Sequence[str] | None) -> tuple[RemoteFile, ...]:
    """Of all files those that serving needs, settings first.

    Args:
        shards: files of weights that the index names; None where there is no index.
    """
    settings = [f for f in files if f.name == INDEX or any(fnmatchcase(f.name, pattern) for pattern in SETTINGS)]
    weights = [f for f in files if is_weights(f)]
    if shards is not None:
        weights = [f for f in weights if f.name in shards]
    elif any(f.name.startswith("model") for f in weights):
        # Others beside them are the same weights in another layout, or an adapter's.
        weights = [f for f in weights if f.name.startswith("model")]
    return (*sorted(settings, key=lambda f: f.name), *sorted(weights, key=lambda f: f.name))


def is_weights(file: RemoteFile) -> bool:
    return fnmatchcase(file.name, WEIGHTS)


def is_plain_name(name: str) -> bool:
    """Can it be a file's name in a folder of ours? Names come from elsewhere."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_. +-]{0,200}", name) is not None


class ContentHash:
    """SHA-256 of a file's content, and beside it whatever its place says of it."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._kind, _, self._expected = file.checksum.partition(":")
        self._sha256 = hashlib.sha256()
        self._other = None
        if self._kind == "md5":
            self._other = hashlib.md5(usedforsecurity=False)
        elif self._kind == "git-sha1":
            # As git names a blob.
            self._other = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)

    def update(self, piece: bytes | memoryview) -> None:
        self._sha256.update(piece)
        if self._other is not None:
            self._other.update(piece)

    def sha256(self) -> str:
        """64 hexadecimal digits."""
        return self._sha256.hexdigest()

    def mismatch(self) -> str:
        """What is wrong, in a phrase; empty: nothing, as far as the place tells."""
        if not self._expected:
            return ""
        found = (self._other or self._sha256).hexdigest()
        return "" if found == self._expected else f"its {self._kind} is {found}, not {self._expected}"
