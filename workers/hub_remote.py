"""A repository of the Hugging Face hub, through its own client: tokens, endpoints, proxies and revisions are as users
know them.

Of `huggingface_hub` the listing, the session, the headers and the errors are used. Not `hf_hub_download`: it begins a
file anew after a kill, since its unfinished files are named by process.
"""

import importlib
import os
from collections.abc import Generator
from importlib import metadata
from typing import Any, NoReturn

from workers.errors import UserError
from workers.model_source import ModelSource
from workers.remote import FetchError, Listing, RemoteFile, TransientError, is_plain_name

REQUEST_BYTES = 8 * 2**30
"""Of one request at most: the hub's delivery network gives no longer answers than 50 GB."""
RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)


class HubRemote:
    """Files of one repository.

    Raises:
        UserError: the client is not installed.
    """

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        # Read by the library once, when it is imported: it tells the hub of its surroundings otherwise.
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")
        try:
            self._hub: Any = importlib.import_module("huggingface_hub")
            self._utils: Any = importlib.import_module("huggingface_hub.utils")
            self._errors: Any = importlib.import_module("huggingface_hub.errors")
            self._constants: Any = importlib.import_module("huggingface_hub.constants")
        except ImportError as error:
            raise UserError(
                f"{source}: the hub's client is not installed ({error}); pip install huggingface_hub"
            ) from None
        vars(self._constants)["HF_HUB_DISABLE_TELEMETRY"] = True  # Where it has been imported before.
        self._endpoint = (os.environ.get("HF_ENDPOINT") or self._constants.ENDPOINT).rstrip("/")
        self._library: Any = {"library_name": "caravan", "library_version": _version()}
        self._api: Any = self._hub.HfApi(endpoint=self._endpoint, **self._library)

    def listing(self) -> Listing:
        try:
            info = self._api.model_info(
                self._source.location,
                revision=self._source.ref,
                files_metadata=True,
                timeout=float(self._constants.HF_HUB_ETAG_TIMEOUT),
            )
            files = tuple(_file(sibling) for sibling in info.siblings if is_plain_name(sibling.rfilename))
            version = str(info.sha or "")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, self._errors.HTTPError | self._errors.HFValidationError):
                self._refuse(error)
            raise FetchError(f"{self._source}: {self._endpoint} does not answer as a hub does ({error!r})") from None
        except Exception as error:
            self._refuse(error)
        if not version:
            raise FetchError(f"{self._source}: {self._endpoint} names no commit")
        return Listing(version, files)

    def read(self, version: str, file: RemoteFile, start: int) -> Generator[bytes, None, None]:
        url = self._hub.hf_hub_url(self._source.location, file.name, revision=version, endpoint=self._endpoint)
        stop = min(file.size, start + REQUEST_BYTES)
        # Compressed, a part of a file would be a part of something else.
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        try:
            headers = {**self._utils.build_hf_headers(**self._library), **headers}
            timeout = float(self._constants.HF_HUB_DOWNLOAD_TIMEOUT)
            with self._hub.get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
                if response.status_code >= 400:
                    response.read()
                self._utils.hf_raise_for_status(response)
                # Who answers with all of it, whatever is asked for, has what is there already skipped.
                skip = start if response.status_code == 200 else 0
                if response.status_code == 206 and not _starts_at(response.headers.get("Content-Range", ""), start):
                    raise TransientError("the answer is another part of the file than was asked for")
                for piece in response.iter_raw():
                    if skip < len(piece):
                        yield piece[skip:]
                    skip = max(0, skip - len(piece))
        except (TransientError, GeneratorExit):
            raise
        except Exception as error:
            self._refuse(error)

    def _refuse(self, error: Exception) -> NoReturn:
        """Say what a client's error means here."""
        source, errors = self._source, self._errors
        if isinstance(error, errors.OfflineModeIsEnabled):
            raise UserError(offline_sentence(source)) from None
        response: Any = getattr(error, "response", None)
        status: int = getattr(response, "status_code", 0)
        page = f"{self._endpoint}/{source.location}"
        has_token = self._hub.get_token() is not None
        if isinstance(error, errors.RevisionNotFoundError):
            raise UserError(f"{source}: the repository has no revision {source.ref!r}; see {page}") from None
        if isinstance(error, errors.GatedRepoError):
            how = "with the account whose token is in use" if has_token else "and set HF_TOKEN, or run `hf auth login`"
            raise UserError(f"{source} is gated: ask for access at {page}, {how}") from None
        if status in (401, 403, 404) or isinstance(error, errors.RepositoryNotFoundError):
            if status == 401 and has_token and response.headers.get("X-Error-Message", "").startswith("Invalid"):
                raise UserError(f"{source}: the hub does not know the token in use; renew it, see HF_TOKEN") from None
            how = (
                "or the account whose token is in use may not see it"
                if has_token
                else "or it is private: then set HF_TOKEN, or run `hf auth login`"
            )
            raise UserError(f"{source}: {self._endpoint} has no such model (status {status}), {how}") from None
        if isinstance(error, errors.DisabledRepoError):
            raise UserError(f"{source}: the hub has disabled this repository; see {page}") from None
        if status in RETRIED_STATUS:
            raise TransientError(_status(status, self._endpoint), _retry_after(response.headers)) from None
        if status:
            raise FetchError(f"{source}: {self._endpoint} answers with status {status}") from None
        if isinstance(error, errors.HTTPError | OSError):
            raise TransientError(f"{self._endpoint}: {_reason(error)}") from None
        if isinstance(error, errors.HFValidationError):
            raise UserError(f"{source}: {error}") from None
        raise FetchError(f"{source}: {self._endpoint}: {error!r}") from None


def is_offline() -> bool:
    """Has the user forbidden requests to the hub, as its client knows it?"""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def offline_sentence(source: ModelSource) -> str:
    """For a model that is not in the cache while nothing may be requested."""
    return (
        f"{source} is not in this host's cache, and offline mode is on (HF_HUB_OFFLINE, or `offline = true` in "
        f"[serve]); run `caravan fetch {source}` where the network may be used, or give a local folder"
    )


def _version() -> str:
    try:
        return metadata.version("caravan")
    except metadata.PackageNotFoundError:
        return "unknown"


def _file(sibling: Any) -> RemoteFile:
    if sibling.lfs is not None:
        return RemoteFile(sibling.rfilename, int(sibling.lfs.size), f"sha256:{sibling.lfs.sha256}")
    return RemoteFile(sibling.rfilename, int(sibling.size), f"git-sha1:{sibling.blob_id}" if sibling.blob_id else "")


def _starts_at(content_range: str, start: int) -> bool:
    return content_range.startswith(f"bytes {start}-")


def _status(status: int, endpoint: str) -> str:
    if status == 429:
        return f"{endpoint} wants fewer requests of this address or token (status 429)"
    return f"{endpoint} answers with status {status}"


def _retry_after(headers: Any) -> float:
    """Seconds, from Retry-After or the hub's own RateLimit: "api";r=0;t=SECONDS."""
    for text in (headers.get("Retry-After", ""), headers.get("RateLimit", "").rpartition(";t=")[2]):
        if text.strip().isdigit():
            return float(text)
    return 0.0


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
