"""Any server with OpenAI's /v1/completions under load, over HTTP.

aiohttp, because it parses HTTP in C and gives a stream's bytes as they come. Of a stream's events only the one with the
usage is read as JSON: client and server share the machine.
"""

import json
import re
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urldefrag

import aiohttp

from cluster.bench_stream import BROKEN, STREAM_BOUND_S, TIMED_OUT, Stream
from cluster.bench_target import CONNECT_BOUND_S, LEAST_TOKEN, TOKENS_END, Facts
from cluster.errors import ServerError, UsageError, one_sentence

# Inside a JSON string both would be written with backslashes.
HAS_USAGE = re.compile(rb'"usage"\s*:\s*\{').search
HAS_ERROR = re.compile(rb'"error"\s*:\s*[{"]').search
JSON_HEADERS = {"content-type": "application/json"}


class HttpTarget:
    """Each stream has a connection of its own, as unrelated clients have.

    Args:
        address: http://HOST:PORT, with #MODEL where the server has several models and not the first is meant.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        base, self._model = urldefrag(address)
        self._base = base.rstrip("/").removesuffix("/v1")
        self._url = f"{self._base}/v1/completions"
        self._open_session: aiohttp.ClientSession | None = None

    async def open(self) -> Facts:
        timeout = aiohttp.ClientTimeout(STREAM_BOUND_S, sock_connect=CONNECT_BOUND_S)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._open_session = aiohttp.ClientSession(timeout=timeout, connector=connector)
        status, listed = await self._ask("GET", "/v1/models")
        models = listed.get("data") if status == 200 else None
        if not (isinstance(models, list) and models and all("id" in model for model in models)):
            raise ServerError(
                f"{self._base}/v1/models answered {status} with no list of models; is it an OpenAI server?"
            )
        names = [model["id"] for model in models]
        if self._model and self._model not in names:
            raise UsageError(f"{self.address}: serves no model {self._model!r}; it has {', '.join(names)}")
        self._model = self._model or names[0]
        model = models[names.index(self._model)]
        return Facts(
            self._model, await self._tokens_end(), model.get("max_model_len"), model.get("owned_by") == "caravan"
        )

    async def stream(self, prompt: Sequence[int], output_tokens: int) -> Stream:
        body = self._body(prompt, output_tokens)
        body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        data = json.dumps(body, separators=(",", ":")).encode()
        stream = Stream(time.perf_counter())
        try:
            async with self._session.post(self._url, data=data, headers=JSON_HEADERS) as response:
                if response.status == 200:
                    await _read(response, stream, output_tokens)
                else:
                    detail = _error_message(await response.read())
                    stream.fail(time.perf_counter(), f"HTTP {response.status}", detail)
        except TimeoutError:
            stream.fail(time.perf_counter(), TIMED_OUT, "the stream took too long")
        except (aiohttp.ClientError, OSError) as error:
            stream.fail(time.perf_counter(), BROKEN, _words(error))
        return stream

    async def close(self) -> None:
        if self._open_session is not None:
            await self._open_session.close()

    @property
    def _session(self) -> aiohttp.ClientSession:
        assert self._open_session is not None, "opened before it is used"
        return self._open_session

    def _body(self, prompt: Sequence[int], output_tokens: int) -> dict[str, Any]:
        return {"model": self._model, "prompt": list(prompt), "max_tokens": output_tokens, "temperature": 0}

    async def _tokens_end(self) -> int:
        """The server does not say how large its vocabulary is, but refuses a token that is not in it."""
        end = TOKENS_END
        while True:
            status, answer = await self._ask("POST", "/v1/completions", self._body([end - 1], 1))
            if status == 200:
                return end
            if status not in (400, 422) or end // 2 <= 2 * LEAST_TOKEN:
                detail = _error_message(json.dumps(answer).encode())
                raise ServerError(f"{self._url} answered {status}: {detail}")
            end //= 2

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        try:
            async with self._session.request(method, self._base + path, json=body) as response:
                text = await response.read()
                answer = (
                    json.loads(text) if text.lstrip().startswith(b"{") else {"error": text.decode(errors="replace")}
                )
                return response.status, answer
        except (aiohttp.ClientConnectorError, TimeoutError):
            raise ServerError(f"no server answers at {self._base}") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ServerError(f"{self._base} cannot be asked for {path}: {_words(error)}") from None


async def _read(response: aiohttp.ClientResponse, stream: Stream, wanted: int) -> None:
    """An event stream to its end: `data: ` lines, of which each with a choice is a message."""
    counted = None
    rest = b""
    async for data in response.content.iter_any():
        now = time.perf_counter()
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:") or line.endswith((b"[DONE]", b"[DONE]\r")):
                continue
            if HAS_USAGE(line):
                event = json.loads(line[5:])
                counted = event["usage"]["completion_tokens"]
                if not event.get("choices"):
                    continue
            elif HAS_ERROR(line):
                stream.fail(now, "error event", _error_message(line[5:]))
                return
            stream.arrivals.append(now)
    stream.close(time.perf_counter(), counted, wanted)


def _error_message(body: bytes) -> str:
    """Of an error in any of the shapes that servers use."""
    try:
        error = json.loads(body)
        error = error.get("error", error) if isinstance(error, dict) else error
        error = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        error = body.decode(errors="replace")
    return one_sentence(error)


def _words(error: Exception) -> str:
    return one_sentence(error) or type(error).__name__
