"""Where a model comes from, as a user names it: a folder, a repository of the Hugging Face hub, a folder behind a URL.

Nothing is looked up here: neither disk nor network.
"""

import re
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from urllib.parse import unquote, urlsplit

from workers.errors import UserError

HUB = "hf://"
EXAMPLE = "hf://ORG/NAME, or hf://ORG/NAME@REVISION"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_REPOSITORY = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")


class SourceKind(Enum):
    LOCAL = "local"
    """A folder every host sees under the same path, or one of this host alone."""
    HUB = "hub"
    URL = "url"


@dataclass(frozen=True)
class ModelSource:
    """One model, wherever it is."""

    kind: SourceKind
    location: str
    """The folder's path, ORG/NAME on the hub, or the URL without a slash at its end."""
    revision: str = ""
    """Branch, tag or commit on the hub; empty: its main branch."""

    @classmethod
    def parse(cls, text: str) -> "ModelSource":
        """What `--model` and `model = ` in a file take.

        Raises:
            UserError: it is none of the three, or looks like one misspelt; the sentence says what was likely meant.
        """
        text = text.strip()
        if not text:
            raise UserError(f"model: must not be empty; give a checkpoint's folder, or {EXAMPLE}")
        if scheme := _SCHEME.match(text):
            return _parse_hub(text) if scheme[1].lower() == "hf" else _parse_url(text, scheme[1].lower())
        _refuse_misspelt(text)
        return cls(SourceKind.LOCAL, text)

    @classmethod
    def of(cls, folder: Path) -> "ModelSource":
        """A folder, whatever its name looks like."""
        return cls(SourceKind.LOCAL, str(folder))

    @property
    def is_local(self) -> bool:
        return self.kind == SourceKind.LOCAL

    @property
    def path(self) -> Path:
        """The folder of a local one, as the user wrote it but for ~ and relative to the working directory."""
        assert self.is_local
        return Path(self.location).expanduser().absolute()

    @property
    def name(self) -> str:
        """What clients ask for unless told otherwise: the last part of folder, repository or URL."""
        if self.is_local:
            return self.path.resolve().name
        return unquote(self.location.rpartition("/")[2])

    @property
    def is_pinned(self) -> bool:
        """Does it name one content for ever? A commit does, a branch or a URL does not."""
        return self.kind == SourceKind.HUB and _COMMIT.fullmatch(self.revision) is not None

    @property
    def ref(self) -> str:
        """The revision, spelt out; empty for a URL."""
        return self.revision or ("main" if self.kind == SourceKind.HUB else "")

    @property
    def needs_network(self) -> bool:
        return self.kind == SourceKind.HUB or (
            self.kind == SourceKind.URL and not self.location.startswith(("file://", "local://", "memory://"))
        )

    @property
    def base(self) -> str:
        """As it is written, without a revision."""
        return f"{HUB}{self.location}" if self.kind == SourceKind.HUB else self.location

    def at(self, revision: str) -> "ModelSource":
        """The same repository at another revision; what has no revisions as it is."""
        return replace(self, revision=revision) if self.kind == SourceKind.HUB else self

    def __str__(self) -> str:
        """As a user would write it; `parse` gives it back."""
        return f"{self.base}@{self.revision}" if self.revision else self.base


def repository_hint(folder: Path) -> str:
    """For a folder that is not there: what was likely meant, to follow a sentence; empty: nothing comes to mind."""
    try:
        text = str(folder.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return ""
    return f"; for the Hugging Face hub write {HUB}{text}" if _REPOSITORY.fullmatch(text) else ""


def _parse_hub(text: str) -> ModelSource:
    rest = text[len(HUB) :].removeprefix("models/").rstrip("/")
    repository, at, revision = rest.partition("@")
    kind = repository.partition("/")[0]
    if kind in ("datasets", "spaces", "kernels", "buckets"):
        raise UserError(f"model: {text} is none of the hub's models but of its {kind}; write {EXAMPLE}")
    if repository.count("/") > 1:
        org, name = repository.split("/")[:2]
        raise UserError(f"model: {text} names something within a repository; did you mean {HUB}{org}/{name}?")
    if _REPOSITORY.fullmatch(repository) is None or any(part.startswith((".", "-")) for part in repository.split("/")):
        missing = " without its organisation" if _NAME.fullmatch(repository) else ""
        raise UserError(f"model: {text} is no repository of the hub{missing}; write {EXAMPLE}")
    revision = unquote(revision)
    if at and not revision:
        raise UserError(f"model: {text} ends where a revision should follow; write {EXAMPLE}")
    if re.search(r"[\s~^:?*\[\\@]|\.\.", revision):
        raise UserError(f"model: {revision!r} cannot be a revision; give a branch, a tag or a commit")
    return ModelSource(SourceKind.HUB, repository, revision)


def _parse_url(text: str, scheme: str) -> ModelSource:
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
    except ValueError as error:
        raise UserError(f"model: {text} is no URL ({error})") from None
    if parts.username is not None or parts.password is not None:
        # It would stand in process lists, logs and in what the server says of itself.
        raise UserError(
            "model: a URL must not hold a user's name or password; give them to the store's own client, by its "
            "environment variables or configuration file"
        )
    if scheme in ("http", "https") and host in _HUB_HOSTS:
        repository = "/".join(parts.path.strip("/").split("/")[:2])
        meant = f"did you mean {HUB}{repository}?" if _REPOSITORY.fullmatch(repository) else f"write {EXAMPLE}"
        raise UserError(f"model: {text} is a page of the Hugging Face hub; {meant}")
    if parts.query or parts.fragment:
        raise UserError(
            f"model: {scheme}://{host}{parts.path} is followed by ? or #; give the URL of a folder, whose files' names "
            "can be put behind it"
        )
    if not (parts.netloc or parts.path.strip("/")):
        raise UserError(f"model: {text} names no folder; write {scheme}://PLACE/FOLDER")
    location = f"{scheme}://{text[len(scheme) + 3 :].rstrip('/')}"
    if scheme == "file" and parts.netloc not in ("", "localhost"):
        raise UserError(
            f"model: {text} names a host; for a folder of this one write file:///{parts.netloc}{parts.path}"
        )
    return ModelSource(SourceKind.URL, location)


def _refuse_misspelt(text: str) -> None:
    """A path that is meant to be no path."""
    lowered = text.lower()
    for host in _HUB_HOSTS:
        if lowered.startswith(f"{host}/"):
            repository = "/".join(text.split("/")[1:3])
            raise UserError(f"model: {text} is no folder; did you mean {HUB}{repository}?")
    if match := re.match(r"(hf|s3a?|gs|gcs|https?|file|az|abfss?|hdfs|sftp|ssh):/?(?=[^/:])", lowered):
        rest = text[match.end() :]
        if match[1] == "file":
            raise UserError(f"model: {text} is no folder; did you mean {text[len('file:') :]}?")
        raise UserError(f"model: {text} is no folder; did you mean {match[1]}://{rest}?")
