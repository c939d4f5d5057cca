"""Messages that are too long, or none of their method, are refused with INVALID_ARGUMENT and a sentence.

For what cannot be read gRPC by itself would say UNKNOWN, and for what is too long no field.
"""

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc import aio


@dataclass(frozen=True)
class Refused:
    """A message that its method does not get to see."""

    sentence: str


class MessageGuard(aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps every method that takes a single message.

    Args:
        max_bytes: of the longest message that is let through; the server's own limit must be higher.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._guarded: dict[str, Any] = {}

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """The method's handler, guarded; None where there is no such method."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        method = handler_call_details.method
        guarded = self._guarded.get(method)
        if guarded is None:
            guarded = self._guarded[method] = _guard(handler, self._max_bytes)
        return guarded


def _guard(handler: Any, max_bytes: int) -> Any:
    parse = handler.request_deserializer

    def read(data: bytes) -> object:
        try:
            message = parse(data)
        except (DecodeError, UnicodeDecodeError, ValueError) as error:
            return Refused(f"the message cannot be read ({str(error)[:200]}); is it of this method?")
        if len(data) > max_bytes:
            return Refused(
                f"{_longest_field(message)}: the message has {len(data)} bytes; at most {max_bytes} are taken"
            )
        return message

    if not handler.response_streaming:
        answer = handler.unary_unary

        async def unary(request: object, context: Any) -> object:
            if isinstance(request, Refused):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.sentence)
            return await answer(request, context)

        return grpc.unary_unary_rpc_method_handler(unary, read, handler.response_serializer)

    stream = handler.unary_stream

    async def streamed(request: object, context: Any) -> None:
        if isinstance(request, Refused):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.sentence)
        responses = stream(request, context)
        if not hasattr(responses, "aclose"):  # A coroutine that writes by itself.
            await responses
            return
        write = context.write
        async with aclosing(responses):
            async for response in responses:
                await write(response)

    return grpc.unary_stream_rpc_method_handler(streamed, read, handler.response_serializer)


def _longest_field(message: Message) -> str:
    """The name of the field that makes a message long."""

    def size(value: Any) -> int:
        if isinstance(value, Message):
            return value.ByteSize()
        if isinstance(value, str | int | float | bytes):
            return len(value) if isinstance(value, str | bytes) else 1
        return sum(size(item) for item in value)

    return max(((size(value), field.name) for field, value in message.ListFields()), default=(0, "message"))[1]
