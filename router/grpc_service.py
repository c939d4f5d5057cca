"""The services of protos/inference.proto behind any gRPC server in Python.

A failed call sets its status on the context and returns: servers log what is raised as a crash.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Protocol, TypeVar

import grpc

from protos import inference_pb2, inference_pb2_grpc
from protos.errors import CaravanError
from protos.status_details import trailing_metadata
from router.call import CallInfo
from router.service import RouterService

T = TypeVar("T")

ATTEMPT_KEYS = ("caravan-attempt", "grpc-previous-rpc-attempts")
"""Metadata in which a client says how often it was refused before."""


class CallContext(Protocol):
    """What both grpc.aio's context and Ray Serve's offer."""

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, metadata: tuple[tuple[str, str | bytes], ...]) -> None: ...

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


class GrpcService(inference_pb2_grpc.InferenceServicer, inference_pb2_grpc.AdminServicer):
    """Services Inference and Admin over gRPC.

    Args:
        core: does the work.
    """

    def __init__(self, core: RouterService) -> None:
        self._core = core

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: CallContext
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        try:
            async with aclosing(self._core.generate(request, call_info(context))) as responses:
                async for response in responses:
                    yield response
        except CaravanError as error:
            _fail(context, error)

    async def GenerateOnce(
        self, request: inference_pb2.GenerateRequest, context: CallContext
    ) -> inference_pb2.GenerateResponse:
        call = call_info(context)
        return await _answer(context, lambda: self._core.generate_once(request, call), inference_pb2.GenerateResponse)

    async def Cancel(self, request: inference_pb2.CancelRequest, context: CallContext) -> inference_pb2.CancelResponse:
        return await _answer(context, lambda: self._core.cancel(request), inference_pb2.CancelResponse)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: CallContext
    ) -> inference_pb2.TokenizeResponse:
        return await _answer(context, lambda: self._core.tokenize(request), inference_pb2.TokenizeResponse)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: CallContext
    ) -> inference_pb2.DetokenizeResponse:
        return await _answer(context, lambda: self._core.detokenize(request), inference_pb2.DetokenizeResponse)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: CallContext
    ) -> inference_pb2.ListModelsResponse:
        return await _answer(context, self._core.list_models, inference_pb2.ListModelsResponse)

    async def GetModel(self, request: inference_pb2.GetModelRequest, context: CallContext) -> inference_pb2.Model:
        return await _answer(context, self._core.get_model, inference_pb2.Model)

    async def GetStatus(self, request: inference_pb2.GetStatusRequest, context: CallContext) -> inference_pb2.Status:
        return self._core.get_status()


def call_info(context: CallContext) -> CallInfo:
    """What a gRPC call says besides its request."""
    # Ray Serve's context knows no deadline: its server cancels the call when that passes.
    time_remaining: Callable[[], float | None] | None = getattr(context, "time_remaining", None)
    attempt = 0
    for key, value in context.invocation_metadata() or ():
        if key in ATTEMPT_KEYS and isinstance(value, str) and value.isdecimal():
            attempt = max(attempt, int(value[:9]))
    return CallInfo(deadline_s=time_remaining() if time_remaining is not None else None, attempt=attempt)


async def _answer(context: CallContext, work: Callable[[], Awaitable[T]], empty: Callable[[], T]) -> T:
    try:
        return await work()
    except CaravanError as error:
        _fail(context, error)
        return empty()


def _fail(context: CallContext, error: CaravanError) -> None:
    """Ends a call with the error's status."""
    if metadata := trailing_metadata(error):
        context.set_trailing_metadata(metadata)
    context.set_code(error.code)
    context.set_details(error.details)
