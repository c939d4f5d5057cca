"""What a router does for a call, whichever door it came through: the doors add nothing but their transport.

Every method raises CaravanError with the status and the sentence for the client, and nothing else.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import TypeVar

from protos import gang_pb2, inference_pb2
from protos.errors import CaravanError, Outcome
from router.call import CallInfo
from router.chat_template import ChatTemplate
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.errors import InvalidRequest
from router.fingerprint import checkpoint_digest, fingerprint
from router.gang_view import LeaderResolver
from router.gangs import Gangs
from router.generation import Generation
from router.metrics import RouterMetrics
from router.model_info import ModelInfo
from router.registry import Registry
from router.tokenizer import Tokenizer
from router.validation import MAX_REQUEST_ID_CHARS, Validator, ValidRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")

INLINE_CHARS = 8192
"""Texts up to this are tokenized in the event loop: a thread would cost more than it saves."""
DIRECT = CallInfo()


def load(config: RouterConfig) -> tuple[ModelInfo, Tokenizer, ChatTemplate | None]:
    """Reads what the router needs of the checkpoint; also the check to run before anything is started.

    Raises:
        RouterConfigError: the checkpoint cannot be served; one sentence says why.
    """
    model = ModelInfo.from_folder(config.model_dir, config.model_name)
    tokenizer = Tokenizer.from_folder(config.model_dir, model.vocab_size)
    return model, tokenizer, ChatTemplate.from_folder(config.model_dir)


class RouterService:
    """Services Inference and Admin, without a transport. Must be made in a running event loop, and called in it.

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
        self._model, self._tokenizer, self._chat_template = load(config)
        self._validator = Validator(config, self._model, self._tokenizer, self._chat_template)
        self._gangs = Gangs(leaders, config, metrics)
        self._dispatcher = Dispatcher(self._gangs, config, metrics)
        self._registry = Registry(config.resume_retention_s, config.max_retained_tokens)
        template = self._chat_template.source if self._chat_template else ""
        self._digest = asyncio.create_task(
            asyncio.to_thread(checkpoint_digest, config.model_dir, template), name="fingerprint"
        )
        self._is_closed = False

    async def close(self) -> None:
        """Ends every stream and task. Later calls end with UNAVAILABLE."""
        self._is_closed = True
        self._dispatcher.close()
        self._registry.close()
        self._digest.cancel()
        await self._gangs.close()

    @property
    def is_alive(self) -> bool:
        """The router's own tasks run. It says nothing of the gangs: they are not made well by a new router."""
        return self._is_closed or self._gangs.is_watching

    @property
    def is_ready(self) -> bool:
        """A gang can take a request now."""
        return not self._is_closed and self._gangs.is_ready

    def why_not_ready(self) -> str:
        """One clause for a person."""
        return self._gangs.why_not_ready()

    @property
    def model_name(self) -> str:
        """What the model is served as."""
        return self._model.name

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's."""
        return self._tokenizer

    async def generate(
        self, request: inference_pb2.GenerateRequest, call: CallInfo = DIRECT
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Streams the continuation of a prompt. Closing the generator ends the work, unless the request is resumable.

        Args:
            call: what the door knows of the call.

        Raises:
            CaravanError: nothing was generated, or after the last response: it did not end well.
        """
        arrival = time.perf_counter()
        generation: Generation | None = None
        try:
            valid = await self._validate(request)
            generation = self._find(valid) or self._start(valid, call, arrival)
            reader = generation.connect(valid.resume_offset)
            self._registry.connected(generation)
            try:
                async with aclosing(generation.responses(reader)) as responses:
                    async for response in responses:
                        yield response
            finally:
                # A client that goes away ends this generator here, at an await or a yield.
                self._registry.disconnected(generation, reader)
        except Exception as error:
            failure = _failure(error)
            if generation is None:
                self._metrics.requests.labels("error", failure.code.name).inc()
            if failure is error:
                raise
            raise failure from error

    async def generate_once(
        self, request: inference_pb2.GenerateRequest, call: CallInfo = DIRECT
    ) -> inference_pb2.GenerateResponse:
        """The whole answer in one message.

        Raises:
            CaravanError: it did not end well.
        """
        whole = inference_pb2.GenerateResponse()
        texts = []
        async with aclosing(self.generate(request, call)) as responses:
            async for response in responses:
                texts.append(response.text)
                response.ClearField("text")
                whole.MergeFrom(response)
        whole.text = "".join(texts)
        return whole

    async def cancel(self, request: inference_pb2.CancelRequest) -> inference_pb2.CancelResponse:
        """Ends every generation of a request, here and at other routers.

        Raises:
            CaravanError: the request has no id.
        """
        if not 1 <= len(request.request_id) <= MAX_REQUEST_ID_CHARS:
            raise InvalidRequest(
                "request_id", f"has 1 to {MAX_REQUEST_ID_CHARS} characters, got {len(request.request_id)}"
            )
        found = self._registry.cancel(request.tenant, request.request_id)
        self._dispatcher.cancel_elsewhere(request.tenant, request.request_id)
        return inference_pb2.CancelResponse(found=found)

    async def tokenize(self, request: inference_pb2.TokenizeRequest) -> inference_pb2.TokenizeResponse:
        """Text to token ids.

        Raises:
            CaravanError: the text is too long.
        """
        with _failures():
            self._validator.check_text("text", request.text)
            token_ids = await _run(len(request.text), lambda: self._tokenizer.encode(request.text))
            return inference_pb2.TokenizeResponse(token_ids=token_ids)

    async def detokenize(self, request: inference_pb2.DetokenizeRequest) -> inference_pb2.DetokenizeResponse:
        """Token ids to text.

        Raises:
            CaravanError: an id is no token.
        """
        with _failures():
            ids, keep = request.token_ids, request.keep_special_tokens
            self._validator.check_token_ids("token_ids", ids)
            text = await _run(len(ids), lambda: self._tokenizer.decode(ids, keep))
            return inference_pb2.DetokenizeResponse(text=text)

    async def list_models(self) -> inference_pb2.ListModelsResponse:
        """All models served: one.

        Raises:
            CaravanError: no gang is ready.
        """
        return inference_pb2.ListModelsResponse(models=[await self.get_model()])

    async def get_model(self) -> inference_pb2.Model:
        """What is served.

        Raises:
            CaravanError: no gang is ready.
        """
        with _failures():
            dtype = self._gangs.ready_views()[0].dtype
            return inference_pb2.Model(
                name=self._model.name,
                dtype=dtype,
                context_length=self._gangs.context_length(),
                vocab_size=self._model.vocab_size,
                num_layers=self._model.num_layers,
                num_moe_layers=self._model.num_moe_layers,
                num_experts=self._model.num_experts,
                fingerprint=fingerprint(await asyncio.shield(self._digest), dtype),
                has_chat_template=self._chat_template is not None,
            )

    def get_status(self) -> inference_pb2.Status:
        """Gangs and their ranks as the router sees them now."""
        return inference_pb2.Status(model=self._model.name, gangs=[_gang_status(view) for view in self._gangs.views])

    async def _validate(self, request: inference_pb2.GenerateRequest) -> ValidRequest:
        context_length = self._gangs.context_length()
        size = len(request.text) + sum(len(message.content) for message in request.chat.messages)
        return await _run(size, lambda: self._validator.check(request, context_length))

    def _find(self, request: ValidRequest) -> Generation | None:
        return self._registry.find(request) if request.resumable else None

    def _start(self, request: ValidRequest, call: CallInfo, arrival: float) -> Generation:
        if request.resumable:
            if request.resume_offset and not request.has_seed and request.sampling.temperature > 0:
                raise InvalidRequest("seed", "is missing; to resume, send the seed that came with the first message")
            if request.resume_offset or call.attempt:
                # Another router may still work on it, for nobody.
                self._dispatcher.cancel_elsewhere(request.tenant, request.request_id, request.sibling)
        generation = Generation(
            self._gangs.next_sequence_id(),
            request,
            call,
            self._dispatcher,
            self._tokenizer.token_bytes,
            self._config,
            self._metrics,
            self._registry.ended,
            arrival,
        )
        self._registry.add(generation)
        return generation


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except CaravanError:
        raise
    except Exception as error:
        raise _failure(error) from error


def _failure(error: Exception) -> CaravanError:
    """What the client is told of an error."""
    if isinstance(error, CaravanError):
        return error
    logger.error("a call failed", exc_info=error)
    return CaravanError(Outcome.FAULT, f"the router failed ({type(error).__name__}); its log says more")


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
            address=rank.address,
            bytes_within_host=rank.load.bytes_within_host,
            bytes_between_hosts=rank.load.bytes_between_hosts,
        )
        for rank in view.ranks
    ]
    hosts = [
        inference_pb2.HostStatus(
            host=host.host,
            hostname=host.hostname,
            interface=host.interface,
            ranks=host.ranks,
            round_trips=[inference_pb2.RoundTrip(host=each.host, seconds=each.seconds) for each in host.round_trips],
        )
        for host in view.hosts
    ]
    return inference_pb2.GangStatus(
        id=view.gang_id,
        epoch=view.epoch,
        running=sum(rank.load.running for rank in view.ranks),
        waiting=sum(rank.load.waiting for rank in view.ranks),
        ranks=ranks,
        state=view.state,
        detail=view.detail,
        stage=view.stage,
        hosts=hosts,
    )
