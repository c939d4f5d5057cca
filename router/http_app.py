"""The OpenAI-compatible HTTP API, in front of the same service as gRPC."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from protos import inference_pb2
from protos.errors import CaravanError
from router.call import CallInfo
from router.http_answer import Answer, Output, Responses
from router.http_body import BodyLimit
from router.http_errors import ApiError, of_caravan, of_http, of_validation
from router.http_requests import ChatBody, CompletionBody, GenerationBody, TooManyChoices
from router.http_shapes import ChatLogprobs, ChatShape, CompletionLogprobs, CompletionShape
from router.service import RouterService

BODY_TIMEOUT_S = 60.0
MAX_REQUEST_ID_CHARS = 200

COMPLETION_FIELDS = {"text": "prompt", "token_ids": "prompt", "prompt_logprobs": "logprobs", "tenant": "user"}
CHAT_FIELDS = {"text": "messages", "token_ids": "messages", "chat": "messages", "logprobs": "top_logprobs"}
"""Names in the HTTP API of fields that are named otherwise in protos/inference.proto."""

ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ERROR_MEANINGS = {
    400: "The request is at fault; the message names the field.",
    404: "No such model or endpoint.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    422: "Not used: faults of a body are answered with 400.",
    429: "Overloaded, or over a quota; Retry-After says when to come back.",
    499: "The request was cancelled.",
    503: "Nothing can answer now; Retry-After says when to come back.",
    504: "The request's deadline passed.",
}


def build_app(core: RouterService, max_body_bytes: int) -> FastAPI:
    """The application.

    Args:
        core: what answers.
        max_body_bytes: longer bodies are refused with 413.
    """
    app = FastAPI(title="Caravan", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes, timeout_s=BODY_TIMEOUT_S)
    _add_error_handlers(app)
    _add_health(app, core)
    api = _Api(core)
    errors = {
        status: {"description": text, "content": {"application/json": {"schema": ERROR_SCHEMA}}}
        for status, text in ERROR_MEANINGS.items()
    }
    for path, method, endpoint in (
        ("/v1/completions", "POST", api.completions),
        ("/v1/chat/completions", "POST", api.chat_completions),
        ("/v1/models", "GET", api.models),
        ("/v1/models/{name:path}", "GET", api.model),
    ):
        app.add_api_route(path, endpoint, methods=[method], responses=errors, response_model=None)  # type: ignore[arg-type]
    return app


class _Api:
    def __init__(self, core: RouterService) -> None:
        self._core = core
        self._created = int(time.time())

    async def completions(self, body: CompletionBody, http_request: Request) -> Response:
        """Continues texts or token ids."""
        requests = self._requests(body)
        request_id = _identify(http_request, requests)
        call = _call(http_request)
        n = body.n or 1
        outputs = []
        for number, prompt in enumerate(body.prompt_list()):
            echo, first = await self._echo(body, prompt) if body.echo else ("", None)
            for sibling in range(n):
                request = requests[number * n + sibling]
                output = self._output(request, call)
                output.echo, output.echo_first, output.counts_prompt = echo, first, sibling == 0
                if body.logprobs is not None:
                    output.logprobs = CompletionLogprobs(self._core.tokenizer)
                outputs.append(output)
        shape = CompletionShape(
            f"cmpl-{request_id}", int(time.time()), self._core.model_name, _with_usage(body), len(outputs)
        )
        return self._answer(body, outputs, shape, COMPLETION_FIELDS, request_id)

    async def chat_completions(self, body: ChatBody, http_request: Request) -> Response:
        """Says what the assistant says next."""
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs to be true", "top_logprobs")
        requests = self._requests(body)
        request_id = _identify(http_request, requests)
        call = _call(http_request)
        outputs = []
        for sibling, request in enumerate(requests):
            output = self._output(request, call)
            output.counts_prompt = sibling == 0
            if body.logprobs:
                output.logprobs = ChatLogprobs(self._core.tokenizer)
            outputs.append(output)
        shape = ChatShape(
            f"chatcmpl-{request_id}",
            int(time.time()),
            self._core.model_name,
            _with_usage(body),
            len(outputs),
            bool(body.stream),
        )
        return self._answer(body, outputs, shape, CHAT_FIELDS, request_id)

    async def models(self) -> Response:
        """All models served here: one."""
        return JSONResponse({"object": "list", "data": [await self._describe()]})

    async def model(self, name: str) -> Response:
        """One model."""
        if name != self._core.model_name:
            raise _no_model(name, self._core.model_name)
        return JSONResponse(await self._describe())

    async def _describe(self) -> dict[str, object]:
        described: dict[str, object] = {
            "id": self._core.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "caravan",
        }
        try:
            model = await self._core.get_model()
        except CaravanError:  # No gang yet; the name stands all the same.
            return described
        return {**described, "max_model_len": model.context_length, "fingerprint": model.fingerprint}

    def _requests(self, body: GenerationBody) -> list[inference_pb2.GenerateRequest]:
        if body.model is not None and body.model != self._core.model_name:
            raise _no_model(body.model, self._core.model_name)
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options: needs stream to be true", "stream_options")
        try:
            return body.choices()
        except TooManyChoices as error:
            raise ApiError(400, f"n: {error}", "n") from None
        except UnicodeEncodeError:
            raise ApiError(400, "a text has half a character in it (a lone surrogate, as \\ud800 is)") from None

    def _output(self, request: inference_pb2.GenerateRequest, call: CallInfo) -> Output:
        def generate() -> Responses:
            return self._core.generate(request, call)

        return Output(generate)

    async def _echo(self, body: CompletionBody, prompt: str | list[int]) -> tuple[str, int | None]:
        """An echoed prompt's text, and its first token where log-probabilities are wanted."""
        try:
            if isinstance(prompt, str):
                if body.logprobs is None:
                    return prompt, None
                tokens = await self._core.tokenize(inference_pb2.TokenizeRequest(text=prompt))
                return prompt, next(iter(tokens.token_ids), None)
            text = await self._core.detokenize(inference_pb2.DetokenizeRequest(token_ids=prompt))
        except CaravanError as error:
            raise of_caravan(error, COMPLETION_FIELDS) from error
        return text.text, prompt[0] if prompt and body.logprobs is not None else None

    def _answer(
        self,
        body: GenerationBody,
        outputs: Sequence[Output],
        shape: CompletionShape | ChatShape,
        fields: dict[str, str],
        request_id: str,
    ) -> Answer:
        return Answer(
            outputs,
            shape,
            is_stream=bool(body.stream),
            with_usage=_with_usage(body),
            fields=fields,
            headers={"x-request-id": request_id},
        )


def _add_health(app: FastAPI, core: RouterService) -> None:
    async def healthz() -> Response:
        """The process runs."""
        return JSONResponse({"status": "ok"})

    async def readyz() -> Response:
        """A request would be answered."""
        if core.is_ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": core.why_not_ready()}, 503, {"retry-after": "1"})

    unready: dict[int | str, dict[str, Any]] = {503: {"description": "Nothing can answer now; `reason` says why."}}
    app.add_api_route("/healthz", healthz, methods=["GET"], response_model=None)
    app.add_api_route("/readyz", readyz, methods=["GET"], response_model=None, responses=unready)
    for path, endpoint in (("/healthz", healthz), ("/readyz", readyz)):
        app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)


def _add_error_handlers(app: FastAPI) -> None:
    async def on_api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def on_caravan_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, CaravanError)
        return of_caravan(error).response()

    async def on_invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return of_validation(error).response()

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return of_http(error, request.method, request.url.path).response()

    async def on_defect(_: Request, error: Exception) -> Response:
        return ApiError(500, f"the router failed ({type(error).__name__}); its log says more").response()

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(CaravanError, on_caravan_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_defect)


def _identify(http_request: Request, requests: Sequence[inference_pb2.GenerateRequest]) -> str:
    """The request's id: the body's, else the header's, else a new one. Gives it to all that have none yet."""
    request_id = requests[0].request_id or http_request.headers.get("x-request-id", "")
    if len(request_id) > MAX_REQUEST_ID_CHARS or not request_id.isprintable() or not request_id.isascii():
        raise ApiError(400, f"request_id: at most {MAX_REQUEST_ID_CHARS} printable ASCII characters", "request_id")
    request_id = request_id or uuid.uuid4().hex
    for index, request in enumerate(requests):
        if not request.request_id:
            request.request_id = f"{request_id}-{index}" if index else request_id
    return request_id


def _call(http_request: Request) -> CallInfo:
    """What the transport says of a call. OpenAI's clients count their attempts."""
    attempt = http_request.headers.get("x-stainless-retry-count", "")
    return CallInfo(attempt=int(attempt) if attempt.isascii() and attempt.isdigit() and len(attempt) < 6 else 0)


def _with_usage(body: GenerationBody) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def _no_model(name: str, served: str) -> ApiError:
    return ApiError(
        404, f"the model {name[:100]!r} does not exist here; this is {served!r}", "model", "model_not_found"
    )
