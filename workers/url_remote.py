"""A folder behind a URL, through fsspec: object stores, web servers, file systems of other hosts.

Stores are read in ranges, one request each, so that every wait is bounded and a broken one costs little. Content is
checked against what is known of it: Google's MD5, or a list that lies beside the files (SHA256SUMS, as `sha256sum *
> SHA256SUMS` makes it, or the manifest of a folder that Caravan fetched).
"""

import base64
import hashlib
import importlib
import json
import threading
from collections.abc import Callable, Generator
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NoReturn, TypeVar

from workers.errors import UserError
from workers.model_manifest import MANIFEST, parse_manifest
from workers.model_source import ModelSource
from workers.remote import INDEX, FetchError, Listing, RemoteFile, TransientError, is_plain_name, needed_files

T = TypeVar("T")

RANGE_BYTES = 8 * 2**20
PIECE_BYTES = 2**20
CALL_BOUND_S = 120.0
MISSING_STATUS = (401, 403, 404, 410)
SUMS = "SHA256SUMS"
SUMS_BYTES = 2**20
# Asked for by name where there is no listing.
KNOWN = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    INDEX,
    "model.safetensors",
    SUMS,
    MANIFEST,
)
# Of a store's description of a file: what changes when the content does.
IDENTITY = (
    "ETag",
    "etag",
    "md5Hash",
    "crc32c",
    "generation",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "mtime",
)
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_LIBRARIES = {"s3": "s3fs", "gcs": "gcsfs"}


class UrlRemote:
    """Files of one folder.

    Raises:
        UserError: fsspec knows no such kind of URL, or what it needs for it is not installed.
    """

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        scheme = source.location.partition("://")[0]
        try:
            core: Any = importlib.import_module("fsspec.core")
            self._fs, self._root = self._bounded(lambda: core.url_to_fs(source.location, **_options(scheme)))
        except ImportError as error:
            raise UserError(_missing(source, scheme, error)) from None
        except Exception as error:
            if isinstance(error, ValueError) and "rotocol not known" in str(error):
                raise UserError(f"model: {source}: {scheme}:// is no kind of URL that fsspec knows") from None
            raise FetchError(f"{source}: {_text(error)}") from None
        self._root = self._root.rstrip("/")
        self._paths: dict[str, str] = {}
        self._is_http = scheme in ("http", "https")

    def listing(self) -> Listing:
        described = self._list()
        files = []
        checksums = self._checksums(described)
        identities = []
        for name, info in sorted(described.items()):
            if info.get("size") is None:
                raise FetchError(f"{self._source}: the server does not say how long {name} is")
            checksum = checksums.get(name) or _own_checksum(info)
            files.append(RemoteFile(name, int(info["size"]), checksum))
            identities.append([name, files[-1].size, checksum, [str(info[k]) for k in IDENTITY if info.get(k)]])
        if not files:
            raise UserError(f"{self._source}: no files of a model are there; give the folder that holds config.json")
        return Listing(hashlib.sha256(json.dumps(identities).encode()).hexdigest(), tuple(files))

    def read(self, version: str, file: RemoteFile, start: int) -> Generator[bytes, None, None]:
        path = self._paths[file.name]
        if self._is_http:
            yield from self._stream(path, start)
            return
        while start < file.size:
            stop = min(start + RANGE_BYTES, file.size)
            piece = bytes(self._call(path, lambda a=start, b=stop: self._fs.cat_file(path, start=a, end=b)))
            if len(piece) != stop - start:
                raise TransientError(f"{file.name}: {len(piece)} bytes came where {stop - start} were asked for")
            yield piece
            start = stop

    def _stream(self, path: str, start: int) -> Generator[bytes, None, None]:
        """One request, since a server that gives only whole files would give one for every range."""
        headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
        stream = self._call(path, lambda: self._fs.open(path, "rb", block_size=0, size=1, headers=headers))
        try:
            # What is there already comes again from such a server, and is passed over.
            skip = start
            if stream.r.status == 206:
                if not stream.r.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                    raise TransientError(f"{path}: the answer is another part of the file than was asked for")
                skip = 0
            while piece := self._call(path, stream.read, PIECE_BYTES):
                if skip < len(piece):
                    yield piece[skip:]
                skip = max(0, skip - len(piece))
        finally:
            stream.close()

    def _list(self) -> dict[str, dict[str, Any]]:
        """Of every file that may be needed what the store says of it."""
        self._fs.invalidate_cache()
        try:
            entries = self._call(self._root, self._fs.ls, self._root, True)
        except UserError:
            if not self._is_http:
                raise
            entries = []
        paths = {}
        for entry in entries:
            path = str(entry["name"])
            name = path.rstrip("/").rpartition("/")[2]
            if entry.get("type") == "file" and is_plain_name(name):
                paths[name] = path, entry
        if self._is_http:
            paths = self._probed(paths)
        wanted = {f.name for f in needed_files([RemoteFile(name, 0) for name in paths], None)} | {
            name for name in paths if name.endswith(".safetensors")
        }
        beside = {SUMS, MANIFEST}
        self._paths = {name: path for name, (path, _) in paths.items() if name in wanted | beside}
        return {name: paths[name][1] for name in wanted}

    def _probed(self, listed: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, tuple[str, dict[str, Any]]]:
        """Pages of links tell neither sizes nor, always, the truth; and some servers give no such page."""
        is_listed = "config.json" in listed
        names = [name for name in listed if needed_files([RemoteFile(name, 0)], None) or name in (SUMS, MANIFEST)]
        found = {}
        for name in names if is_listed else KNOWN:
            path = f"{self._root}/{name}"
            if (info := self._info(path)) is not None:
                found[name] = path, info
        if not is_listed and INDEX in found:
            for name in _shards(self._small(found[INDEX][0])):
                path = f"{self._root}/{name}"
                if (info := self._info(path)) is not None:
                    found[name] = path, info
        return found

    def _info(self, path: str) -> dict[str, Any] | None:
        try:
            return dict(self._call(path, self._fs.info, path))
        except UserError:
            return None

    def _checksums(self, described: dict[str, Any]) -> dict[str, str]:
        """What lists beside the files say of them."""
        checksums = {}
        if (path := self._paths.get(SUMS)) is not None:
            for line in self._small(path).decode(errors="replace").splitlines():
                digest, _, name = line.strip().partition(" ")
                checksums[name.strip().lstrip("*").removeprefix("./")] = f"sha256:{digest.lower()}"
        if (path := self._paths.get(MANIFEST)) is not None:
            try:
                for name, kept in parse_manifest(self._small(path)).files.items():
                    checksums[name] = f"sha256:{kept.sha256}"
            except ValueError as error:
                raise UserError(f"{self._source}: its {MANIFEST} cannot be understood ({error})") from None
        return {name: checksum for name, checksum in checksums.items() if name in described}

    def _small(self, path: str) -> bytes:
        content = bytes(self._call(path, self._fs.cat_file, path))
        if len(content) > 64 * SUMS_BYTES:
            raise UserError(f"{path}: is longer than such a file can be")
        return content

    def _call(self, path: str, function: Callable[..., T], *arguments: Any) -> T:
        """A call of fsspec's, bounded, and its errors in our words."""
        try:
            return self._bounded(lambda: function(*arguments))
        except (TransientError, UserError, FetchError):
            raise
        except Exception as error:
            self._refuse(error, path)

    def _bounded(self, function: Callable[[], T]) -> T:
        """Its stores have bounds of their own, or none: a call that does not end is left behind."""
        answers: SimpleQueue[Callable[[], T]] = SimpleQueue()

        def run() -> None:
            try:
                value = function()
                answers.put(lambda: value)
            except Exception as error:
                answers.put(partial(_raise, error))

        threading.Thread(target=run, name="fsspec", daemon=True).start()
        try:
            answer = answers.get(timeout=CALL_BOUND_S)
        except Empty:
            raise TransientError(f"{self._source}: no answer within {CALL_BOUND_S:g} s") from None
        return answer()

    def _refuse(self, error: Exception, path: str) -> NoReturn:
        source = self._source
        kind = type(error).__name__
        status = getattr(error, "status", None) or getattr(error, "code", None)
        if kind in (
            "NoCredentialsError",
            "PartialCredentialsError",
            "CredentialRetrievalError",
            "DefaultCredentialsError",
        ):
            raise UserError(
                f"{source}: the store's client finds no credentials ({error}); see what variables and files it reads"
            ) from None
        if isinstance(error, PermissionError) or status in (401, 403, "401", "403"):
            raise UserError(
                f"{source}: {path} may not be read with these credentials ({_text(error)}); see the store's client"
            ) from None
        if self._is_http and isinstance(error, FileNotFoundError) and error.__cause__ is not None:
            # fsspec says of whatever happens that there is no such file.
            status = getattr(error.__cause__, "status", None)
            if status not in MISSING_STATUS:
                raise TransientError(f"{path}: {_text(error.__cause__)}") from None
        if isinstance(error, FileNotFoundError | NotADirectoryError) or status in (404, "404"):
            raise UserError(f"{source}: there is no {path}") from None
        if isinstance(error, ImportError):
            raise UserError(_missing(source, source.location.partition("://")[0], error)) from None
        raise TransientError(f"{path}: {_text(error)}") from None


def _raise(error: Exception) -> NoReturn:
    raise error


def _options(scheme: str) -> dict[str, Any]:
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme in ("http", "https"):
        aiohttp: Any = importlib.import_module("aiohttp")
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
        # Compressed, a part of a file would be a part of something else.
        options |= {
            "client_kwargs": {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}, "trust_env": True}
        }
    return options


def _missing(source: ModelSource, scheme: str, error: ImportError) -> str:
    if extra := EXTRAS.get(scheme):
        library = _LIBRARIES[extra]
        return f"{source}: {scheme}:// needs {library}, which is not installed: pip install 'caravan[{extra}]'"
    return f"{source}: {scheme}:// needs a library that is not installed: {error}"


def _own_checksum(info: dict[str, Any]) -> str:
    # Google's is the content's; an ETag of S3 is so only for some ways of writing and encrypting it.
    if text := info.get("md5Hash"):
        return f"md5:{base64.b64decode(text).hex()}"
    return ""


def _shards(index: bytes) -> list[str]:
    try:
        return sorted(name for name in set(json.loads(index)["weight_map"].values()) if is_plain_name(name))
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
