"""Errors of the HTTP API, in the shape its clients know: {"error": {"message", "type", "param", "code"}}."""

import json
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import grpc
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from protos.errors import CaravanError
from router.errors import InvalidRequest
from router.http_requests import ChatBody, CompletionBody, NotSupported

CLIENT_CLOSED_REQUEST = 499
STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: CLIENT_CLOSED_REQUEST,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
"""HTTP status of each gRPC status; 500 for the rest."""

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    CLIENT_CLOSED_REQUEST: "request_cancelled",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
CODES = {
    413: "request_too_large",
    429: "rate_limit_exceeded",
    CLIENT_CLOSED_REQUEST: "cancelled",
    503: "service_unavailable",
    504: "deadline_exceeded",
}
DEFAULT_RETRY_AFTER_S = 1.0
"""Told with 429 and 503 where the router has no better number."""
KNOWN_FIELDS = sorted({*CompletionBody.model_fields, *ChatBody.model_fields})


class ApiError(Exception):
    """A request ends with this status.

    Args:
        status: of HTTP.
        message: one sentence: what is wrong, where, what to do.
        param: the field at fault.
        code: what a program may look at.
        headers: sent beside it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or CODES.get(status)
        self.headers = dict(headers or {})

    def body(self) -> str:
        """JSON."""
        kind = TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error})

    def response(self) -> Response:
        """The whole answer."""
        return Response(self.body().encode(), self.status, headers=self.headers or None, media_type="application/json")


def of_caravan(error: CaravanError, fields: Mapping[str, str] | None = None) -> ApiError:
    """The same failure over HTTP.

    Args:
        fields: names in this API of fields that are named otherwise in protos/inference.proto.
    """
    status = STATUS.get(error.code, 500)
    message, param = error.details, None
    if isinstance(error, InvalidRequest):
        param = (fields or {}).get(error.field, error.field)
        message = message.replace(f"{error.field}: ", f"{param}: ", 1)
    headers = {}
    if status in (429, 503):
        after_s = DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        # Whole seconds is all that the standard header has; OpenAI's clients look at the other one first.
        headers = {"retry-after": str(max(1, math.ceil(after_s))), "retry-after-ms": str(math.ceil(after_s * 1000))}
    return ApiError(status, message, param, headers=headers)


def of_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    first: dict[str, Any] = error.errors()[0]
    kind, message = first["type"], str(first["msg"])
    where = _field(first["loc"])
    if kind == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', message)}")
    if where is None:
        if kind == "missing":
            return ApiError(400, "the body is missing; send a JSON object")
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    if kind == "extra_forbidden":
        name = where.rpartition(".")[2]
        close = get_close_matches(name, KNOWN_FIELDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "leave it out"
        return ApiError(400, f"{where[:200]}: unknown field; {hint}", where[:200], "unknown_field")
    if kind == "missing":
        return ApiError(400, f"{where}: is missing", where)
    message = message.removeprefix("Input ").removeprefix("Value error, ")
    cause = first.get("ctx", {}).get("error")
    return ApiError(400, f"{where}: {message}", where, "not_supported" if isinstance(cause, NotSupported) else None)


def of_http(error: HTTPException, method: str, path: str) -> ApiError:
    """What the framework itself refuses: paths, methods, bodies."""
    sentences = {
        404: f"{method} {path[:200]}: there is no such endpoint here; see /openapi.json",
        405: f"{path[:200]} does not take {method}",
        400: "the body cannot be read as JSON",
    }
    message = sentences.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers)


def _field(location: Sequence[int | str]) -> str | None:
    """Where in the body, as a path of names and positions; None: the body itself.

    Names of the alternatives of a union, which pydantic puts between, are left out.
    """
    parts = [part for part in location[1:] if part not in _UNION_TAGS]
    # The place of a syntax error is a position in the text.
    return ".".join(str(part) for part in parts) if parts and isinstance(parts[0], str) else None


_UNION_TAGS = {"tokens", "texts", "token_lists", "parts"}
