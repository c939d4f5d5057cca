"""One request of the HTTP API, answered: generation runs while the client stays, and no longer."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from protos import inference_pb2
from protos.errors import CaravanError
from router.http_errors import of_caravan
from router.http_shapes import (
    DONE,
    FINISH_REASONS,
    Choice,
    CompletionLogprobs,
    Logprobs,
    Shape,
    Usage,
    add_logprobs,
)

Responses = AsyncGenerator[inference_pb2.GenerateResponse, None]
UNSPECIFIED = inference_pb2.FINISH_REASON_UNSPECIFIED
QUEUED_PER_CHOICE = 4
"""Messages of a choice that wait while others are written; what comes after stays in the choice's own stream."""


@dataclass
class Output:
    """One choice on its way.

    Attributes:
        generate: starts the generation.
        logprobs: how to write log-probabilities; None where none were asked for.
        echo: text that comes before the output.
        echo_first: first token of an echoed prompt whose log-probabilities are shown.
        counts_prompt: its prompt is counted in the usage; of several choices of one prompt only one's is.
    """

    generate: Callable[[], Responses]
    logprobs: Logprobs | None = None
    echo: str = ""
    echo_first: int | None = None
    counts_prompt: bool = True

    def take(
        self, response: inference_pb2.GenerateResponse, usage: Usage
    ) -> tuple[str, dict[str, list[Any]] | None, str | None]:
        """Text, log-probabilities and finish reason of one message."""
        text = response.text
        if self.echo:
            text, self.echo = self.echo + text, ""
        logprobs = None
        if self.logprobs is not None:
            logprobs = self._echo_logprobs(response)
            logprobs = add_logprobs(logprobs, self.logprobs.of(response.logprobs))
        if response.finish_reason == UNSPECIFIED:
            return text, logprobs, None
        usage.completion_tokens += response.usage.completion_tokens
        if self.counts_prompt:
            usage.prompt_tokens += response.usage.prompt_tokens
            usage.cached_tokens += response.usage.cached_tokens
        # Where there is no name for it an error follows, which says more.
        return text, logprobs, FINISH_REASONS.get(response.finish_reason)

    def _echo_logprobs(self, response: inference_pb2.GenerateResponse) -> dict[str, list[Any]] | None:
        if self.echo_first is None or not isinstance(self.logprobs, CompletionLogprobs):
            return None
        first, self.echo_first = self.logprobs.first(self.echo_first), None
        return add_logprobs(first, self.logprobs.of(response.prompt_logprobs))


class Answer(Response):
    """Generates and writes. What goes wrong before the first byte is raised, for the status to say so.

    Args:
        outputs: the choices, in order.
        shape: how they are written.
        is_stream: as server-sent events, one write for whatever steps have brought.
        with_usage: a stream ends with its usage.
        fields: names in this API of fields that are named otherwise in protos/inference.proto.
        headers: sent with the answer.
    """

    def __init__(
        self,
        outputs: Sequence[Output],
        shape: Shape,
        *,
        is_stream: bool,
        with_usage: bool,
        fields: Mapping[str, str],
        headers: Mapping[str, str],
    ) -> None:
        super().__init__()
        self._outputs = outputs
        self._shape = shape
        self._is_stream = is_stream
        self._with_usage = with_usage
        self._fields = fields
        self._own_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._stream(send) if self._is_stream else self._whole(send))
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            # Where the client is gone, or the server ends, the work does too, and has done so when this returns.
            is_cut = not work.done()
            work.cancel()
            await asyncio.wait((work,))
        if not is_cut:
            try:
                work.result()
            except CaravanError as error:
                raise of_caravan(error, self._fields) from error

    async def _whole(self, send: Send) -> None:
        usage = Usage()
        choices = [Choice() for _ in self._outputs]
        async with aclosing(self._batches()) as batches:
            async for batch in batches:
                for index, response in batch:
                    text, logprobs, finish_reason = self._outputs[index].take(response, usage)
                    choice = choices[index]
                    choice.text += text
                    choice.logprobs = add_logprobs(choice.logprobs, logprobs)
                    choice.finish_reason = finish_reason or ""
        body = self._shape.whole(choices, usage).encode()
        await self._start(send, b"application/json", (b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, send: Send) -> None:
        usage = Usage()
        left = len(self._outputs)
        outputs, event = self._outputs, self._shape.event
        is_started = False
        try:
            async with aclosing(self._batches()) as batches:
                async for batch in batches:
                    events = []
                    for index, response in batch:
                        text, logprobs, finish_reason = outputs[index].take(response, usage)
                        events.append(event(index, text, logprobs, finish_reason))
                        left -= finish_reason is not None
                    if not left:
                        if self._with_usage:
                            events.append(self._shape.usage_event(usage))
                        events.append(DONE)
                    if not is_started:
                        is_started = True
                        await self._start(send, b"text/event-stream; charset=utf-8", (b"cache-control", b"no-cache"))
                    await send({"type": "http.response.body", "body": "".join(events).encode(), "more_body": left > 0})
        except CaravanError as error:
            if not is_started:
                raise
            # The status has long been sent; OpenAI's clients raise what an event calls an error.
            body = f"data: {of_caravan(error, self._fields).body()}\n\n{DONE}"
            await send({"type": "http.response.body", "body": body.encode(), "more_body": False})

    async def _start(self, send: Send, media_type: bytes, *headers: tuple[bytes, bytes]) -> None:
        all_headers = [(b"content-type", media_type), *headers, *self._own_headers]
        await send({"type": "http.response.start", "status": 200, "headers": all_headers})

    def _batches(self) -> AsyncGenerator[list[tuple[int, inference_pb2.GenerateResponse]], None]:
        """What has arrived, each message with its choice's index; waits for something to arrive."""
        generations = [output.generate() for output in self._outputs]
        return _one(generations[0]) if len(generations) == 1 else _merged(generations)


async def _one(generation: Responses) -> AsyncGenerator[list[tuple[int, inference_pb2.GenerateResponse]], None]:
    async with aclosing(generation):
        async for response in generation:
            yield [(0, response)]


async def _merged(
    generations: Sequence[Responses],
) -> AsyncGenerator[list[tuple[int, inference_pb2.GenerateResponse]], None]:
    """All of them at once. The first to fail ends all."""
    arrived: asyncio.Queue[tuple[int, inference_pb2.GenerateResponse | CaravanError | None]]
    arrived = asyncio.Queue(QUEUED_PER_CHOICE * len(generations))

    async def follow(index: int, generation: Responses) -> None:
        end = None
        try:
            async with aclosing(generation):
                async for response in generation:
                    await arrived.put((index, response))
        except CaravanError as error:
            end = error
        await arrived.put((index, end))

    tasks = [asyncio.ensure_future(follow(i, generation)) for i, generation in enumerate(generations)]
    left = len(tasks)
    try:
        while left:
            items = [await arrived.get()]
            while not arrived.empty():
                items.append(arrived.get_nowait())
            batch = []
            for index, item in items:
                if isinstance(item, CaravanError):
                    raise item
                if item is None:
                    left -= 1
                else:
                    batch.append((index, item))
            if batch:
                yield batch
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    """Returns once the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
