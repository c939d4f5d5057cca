"""A gRPC and an OpenAI server on loopback, in a thread with a loop of its own, that answer as they are told."""

import asyncio
import json
import threading
from dataclasses import dataclass, field
from typing import Self

import grpc
from aiohttp import web
from grpc import aio

from protos import inference_pb2, inference_pb2_grpc

USAGE_EVENT = 'data: {"id": "x", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": %d}}\n\n'
# Text that looks like what the client looks for.
TOKEN_EVENT = (
    r'data: {"id": "x", "choices": [{"text": "\"usage\": {\"error\": {", "logprobs": null}], "usage": null}' + "\n\n"
)


@dataclass
class Behaviour:
    """What the servers do with the next requests."""

    tokens_a_message: int = 1
    step_s: float = 0.0
    shortfall: int = 0
    """Tokens by which an answer is too short."""
    refuse_every: int = 0
    """Of so many requests one is refused; 0: none is."""
    break_after: int | None = None
    """Messages after which a stream ends with an error."""
    has_usage: bool = True
    split_events: bool = False
    """HTTP: events come in pieces that end anywhere."""
    vocab_size: int = 5000
    context_length: int = 1000
    models: tuple[str, ...] = ("fake",)


@dataclass
class Seen:
    prompts: list[list[int]] = field(default_factory=list)
    bodies: list[dict] = field(default_factory=list)
    now: int = 0
    most_at_once: int = 0


class FakeServers(inference_pb2_grpc.InferenceServicer, inference_pb2_grpc.AdminServicer):
    """Both doors, as a context manager. `grpc_address` and `url` are theirs."""

    def __init__(self) -> None:
        self.behaviour, self.seen = Behaviour(), Seen()
        self.grpc_address = self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_error: object) -> None:
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        self._grpc = aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(self, self._grpc)
        inference_pb2_grpc.add_AdminServicer_to_server(self, self._grpc)
        self.grpc_address = f"127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"
        await self._grpc.start()
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.completions)
        self._http = web.AppRunner(app, shutdown_timeout=0.1)
        await self._http.setup()
        site = web.TCPSite(self._http, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._http.addresses[0][1]}"

    async def _stop(self) -> None:
        await self._grpc.stop(0)
        await self._http.cleanup()

    def _begin(self, prompt: list[int]) -> bool:
        """Whether the request is refused."""
        self.seen.prompts.append(prompt)
        every = self.behaviour.refuse_every
        return bool(every) and len(self.seen.prompts) % every == 0

    async def _messages(self, wanted: int):
        """Tokens of each message."""
        self.seen.now += 1
        self.seen.most_at_once = max(self.seen.most_at_once, self.seen.now)
        try:
            left = wanted - self.behaviour.shortfall
            while left > 0:
                await asyncio.sleep(self.behaviour.step_s)
                count = min(left, self.behaviour.tokens_a_message)
                left -= count
                yield count
        finally:
            self.seen.now -= 1

    async def GetStatus(self, request, context):
        return inference_pb2.Status(model="fake")

    async def GetModel(self, request, context):
        return inference_pb2.Model(
            name="fake", vocab_size=self.behaviour.vocab_size, context_length=self.behaviour.context_length
        )

    async def Generate(self, request, context):
        assert request.ignore_eos and request.temperature == 0
        if self._begin(list(request.token_ids.ids)):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        sent = number = 0
        async for count in self._messages(request.max_tokens):
            if number == self.behaviour.break_after:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "rank 1 died")
            sent, number = sent + count, number + 1
            yield inference_pb2.GenerateResponse(text="t", token_ids=[7] * count)
        usage = inference_pb2.Usage(prompt_tokens=3, completion_tokens=sent)
        if self.behaviour.has_usage:
            yield inference_pb2.GenerateResponse(finish_reason=inference_pb2.FINISH_REASON_LENGTH, usage=usage)

    async def models(self, _request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name, "max_model_len": 1000} for name in self.behaviour.models]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if max(body["prompt"]) >= self.behaviour.vocab_size:
            return web.json_response({"error": {"message": "prompt: no such token"}}, status=400)
        if not body.get("stream"):
            return web.json_response({"choices": [{"text": "t"}]})
        self.seen.bodies.append(body)
        if self._begin(body["prompt"]):
            return web.json_response({"error": {"message": "the queue is full"}}, status=429)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        sent = number = 0
        async for count in self._messages(body["max_tokens"]):
            if number == self.behaviour.break_after:
                await self._write(response, 'data: {"error": {"message": "rank 1 died"}}\n\n')
                return response
            sent, number = sent + count, number + 1
            await self._write(response, TOKEN_EVENT)
        if self.behaviour.has_usage:
            await self._write(response, USAGE_EVENT % sent)
        await self._write(response, "data: [DONE]\n\n")
        return response

    async def _write(self, response: web.StreamResponse, text: str) -> None:
        assert json.loads(text[6:]) if "DONE" not in text else True
        data = text.encode()
        pieces = (data[:11], data[11:40], data[40:]) if self.behaviour.split_events else (data,)
        for piece in pieces:
            await response.write(piece)
            if len(pieces) > 1:
                await asyncio.sleep(0.002)
