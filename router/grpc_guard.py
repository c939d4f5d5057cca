"""Calls whose message is no message of their method end with INVALID_ARGUMENT; gRPC by itself would say UNKNOWN."""

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio


@dataclass(frozen=True)
class Malformed:
    """Bytes that could not be read."""

    reason: str


class MalformedGuard(aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps every method that takes a single message."""

    def __init__(self) -> None:
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
            guarded = self._guarded[method] = _guard(handler)
        return guarded


def _guard(handler: Any) -> Any:
    parse = handler.request_deserializer

    def read(data: bytes) -> object:
        try:
            return parse(data)
        except (DecodeError, UnicodeDecodeError, ValueError) as error:
            return Malformed(str(error))

    if not handler.response_streaming:
        answer = handler.unary_unary

        async def unary(request: object, context: Any) -> object:
            if isinstance(request, Malformed):
                await _refuse(request, context)
            return await answer(request, context)

        return grpc.unary_unary_rpc_method_handler(unary, read, handler.response_serializer)

    stream = handler.unary_stream

    async def streamed(request: object, context: Any) -> None:
        if isinstance(request, Malformed):
            await _refuse(request, context)
        responses = stream(request, context)
        if not hasattr(responses, "aclose"):  # A coroutine that writes by itself.
            await responses
            return
        write = context.write
        async with aclosing(responses):
            async for response in responses:
                await write(response)

    return grpc.unary_stream_rpc_method_handler(streamed, read, handler.response_serializer)


async def _refuse(request: Malformed, context: Any) -> None:
    await context.abort(
        grpc.StatusCode.INVALID_ARGUMENT, f"the message cannot be read ({request.reason[:200]}); is it of this method?"
    )
