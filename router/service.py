"""The services of protos/inference.proto, for any gRPC server in Python: Ray Serve's replica or plain grpc.aio.

A failed call sets its status on the context and returns; nothing is raised for what a user or a rank did wrong.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol, TypeVar

import grpc

from protos import gang_pb2, inference_pb2
from protos.errors import CaravanError, Outcome
from router.config import RouterConfig
from router.gang_view import LeaderResolver
from router.gangs import Gangs
from router.generation import Generation
from router.metrics import RouterMetrics
from router.model_info import ModelInfo
from router.tokenizer import Tokenizer
from router.validation import Validator, ValidRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")

INLINE_CHARS = 8192
"""Texts up to this are tokenized in the event loop: a thread would cost more than it saves."""


class CallContext(Protocol):
    """What both grpc.aio's context and Ray Serve's offer."""

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...


def load(config: RouterConfig) -> tuple[ModelInfo, Tokenizer]:
    """Reads what the router needs of the checkpoint; also the check to run before anything is started.

    Raises:
        RouterConfigError: the checkpoint cannot be served; one sentence says why.
    """
    model = ModelInfo.from_folder(config.model_dir, config.model_name)
    return model, Tokenizer.from_folder(config.model_dir, model.vocab_size)


class RouterService:
    """Services Inference and Admin. Must be made in a running event loop, and called in the same one.

    Args:
        config: what is served and the bounds.
        leaders: finds the leader of each gang.
        metrics: the process's metrics.

    Raises:
        RouterConfigError: the checkpoint cannot be served.
    """

    def __init__(self, config: RouterConfig, leaders: Sequence[LeaderResolver], metrics: RouterMetrics) -> None:
        self._config = config
        self._metrics = metrics
        self._model, self._tokenizer = load(config)
        self._validator = Validator(config, self._model, self._tokenizer)
        self._gangs = Gangs(leaders, config, metrics)
        self._is_closed = False

    async def close(self) -> None:
        """Ends every stream and task. Later calls end with UNAVAILABLE."""
        self._is_closed = True
        await self._gangs.close()

    @property
    def is_alive(self) -> bool:
        """The router's own tasks run. It says nothing of the gangs: they are not made well by a new router."""
        return self._is_closed or self._gangs.is_watching

    async def Generate(
        self, request: inference_pb2.GenerateRequest, grpc_context: CallContext
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        with self._metrics.stream() as timer:
            generation: Generation | None = None
            try:
                valid = await self._validate(request)
                generation = Generation(valid, self._gangs, self._tokenizer.token_bytes, self._config, timer)
                while (response := await generation.next()) is not None:
                    yield response
                if generation.error is not None:
                    raise generation.error
                timer.status = "OK"
            except Exception as error:
                failure = self._fail(grpc_context, error)
                timer.finish_reason, timer.status = "error", failure.code.name
            finally:
                # A client that cancels ends this generator here, at an await or a yield.
                if generation is not None:
                    generation.close()

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, grpc_context: CallContext
    ) -> inference_pb2.TokenizeResponse:
        try:
            self._validator.check_text("text", request.text)
            token_ids = await _run(len(request.text), lambda: self._tokenizer.encode(request.text))
            return inference_pb2.TokenizeResponse(token_ids=token_ids)
        except Exception as error:
            self._fail(grpc_context, error)
            return inference_pb2.TokenizeResponse()

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, grpc_context: CallContext
    ) -> inference_pb2.DetokenizeResponse:
        try:
            ids, keep = request.token_ids, request.keep_special_tokens
            self._validator.check_token_ids("token_ids", ids)
            text = await _run(len(ids), lambda: self._tokenizer.decode(ids, keep))
            return inference_pb2.DetokenizeResponse(text=text)
        except Exception as error:
            self._fail(grpc_context, error)
            return inference_pb2.DetokenizeResponse()

    async def GetModel(self, request: inference_pb2.GetModelRequest, grpc_context: CallContext) -> inference_pb2.Model:
        model = inference_pb2.Model(
            name=self._model.name,
            vocab_size=self._model.vocab_size,
            num_layers=self._model.num_layers,
            num_moe_layers=self._model.num_moe_layers,
            num_experts=self._model.num_experts,
        )
        try:
            model.dtype = self._gangs.ready_views()[0].dtype
            model.context_length = self._gangs.context_length()
        except Exception as error:
            self._fail(grpc_context, error)
        return model

    async def GetStatus(
        self, request: inference_pb2.GetStatusRequest, grpc_context: CallContext
    ) -> inference_pb2.Status:
        gangs = [_gang_status(view) for view in self._gangs.views]
        return inference_pb2.Status(model=self._model.name, gangs=gangs)

    async def _validate(self, request: inference_pb2.GenerateRequest) -> ValidRequest:
        context_length = self._gangs.context_length()
        return await _run(len(request.text), lambda: self._validator.check(request, context_length))

    def _fail(self, context: CallContext, error: Exception) -> CaravanError:
        """Ends a call with the error's status."""
        if not isinstance(error, CaravanError):
            logger.error("a call failed", exc_info=error)
            error = CaravanError(Outcome.FAULT, f"the router failed ({type(error).__name__}); its log says more")
        context.set_code(error.code)
        context.set_details(error.details)
        return error


async def _run(size: int, work: Callable[[], T]) -> T:
    """Small work here and now, large work in a thread."""
    return work() if size <= INLINE_CHARS else await asyncio.to_thread(work)


def _gang_status(view: gang_pb2.GangView) -> inference_pb2.GangStatus:
    ranks = [
        inference_pb2.RankStatus(
            rank=rank.rank,
            incarnation=rank.incarnation,
            pid=rank.pid,
            host=rank.host,
            state=rank.state,
            experts=rank.experts,
            tokens_computed=rank.load.tokens_computed,
            tokens_exchanged=rank.load.tokens_exchanged,
            weights_bytes_read=rank.load.weights_bytes_read,
        )
        for rank in view.ranks
    ]
    return inference_pb2.GangStatus(
        id=view.gang_id,
        epoch=view.epoch,
        running=sum(rank.load.running for rank in view.ranks),
        waiting=sum(rank.load.waiting for rank in view.ranks),
        ranks=ranks,
        state=view.state,
        detail=view.detail,
    )
