"""The token plane's end at a rank: sequences in, one message a step and router out."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator

import grpc

from protos import gang_pb2, gang_pb2_grpc, inference_pb2
from workers.inbox import Abort, Add, Cancel, Inbox, RouterGone
from workers.scheduler import Emitted, Finish
from workers.sequence import Logprobs, SamplingParams, Sequence

log = logging.getLogger(__name__)

_FINISH = {
    None: inference_pb2.FINISH_REASON_UNSPECIFIED,
    Finish.STOP: inference_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    Finish.DEADLINE: inference_pb2.FINISH_REASON_DEADLINE,
    Finish.ABORT: inference_pb2.FINISH_REASON_ABORT,
}


class TokenServer(gang_pb2_grpc.RankServicer):
    """Serves `caravan.internal.v1.Rank` for one rank. All methods run on the server's event loop.

    Args:
        header: a StepOutput with gang, epoch, rank and incarnation set.
        vocab_size: ids from here on are refused.
        max_model_len: tokens of the longest sequence.
    """

    def __init__(self, header: gang_pb2.StepOutput, inbox: Inbox, vocab_size: int, max_model_len: int) -> None:
        self._header, self._inbox = header, inbox
        self._vocab_size, self._max_model_len = vocab_size, max_model_len
        self._routers: dict[str, asyncio.Queue[gang_pb2.StepOutput]] = {}

    async def enter(self, epoch: int) -> None:
        """What is submitted to another epoch is refused from now on."""
        self._header.epoch = epoch

    async def Connect(
        self,
        request_iterator: AsyncIterator[gang_pb2.RouterMessage],
        context: grpc.aio.ServicerContext[gang_pb2.RouterMessage, gang_pb2.StepOutput],
    ) -> AsyncIterator[gang_pb2.StepOutput]:
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be Hello")
        router, outputs = first.hello.router_id, asyncio.Queue[gang_pb2.StepOutput]()
        if first.hello.gang_id != self._header.gang_id or router in self._routers:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this is gang {self._header.gang_id} (asked: {first.hello.gang_id}), or router {router} is connected",
            )
        if first.hello.incarnation not in (0, self._header.incarnation):
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this is incarnation {self._header.incarnation} (asked: {first.hello.incarnation})",
            )
        self._routers[router] = outputs
        reader = asyncio.create_task(self._read(router, request_iterator, outputs))
        try:
            # So the router knows that it was accepted.
            await context.send_initial_metadata(())
            while True:
                yield await outputs.get()
        finally:
            reader.cancel()
            del self._routers[router]
            # Never work for nobody.
            self._inbox.put(RouterGone(router))

    async def Wake(
        self,
        request: gang_pb2.WakeRequest,
        context: grpc.aio.ServicerContext[gang_pb2.WakeRequest, gang_pb2.WakeResponse],
    ) -> gang_pb2.WakeResponse:
        if request.gang_id == self._header.gang_id:
            self._inbox.wake(request.epoch, request.step)
        return gang_pb2.WakeResponse()

    def publish(self, step: int, emitted: list[Emitted], load: gang_pb2.RankLoad) -> None:
        """Send a step's tokens to the routers that wait for them: one message each."""
        by_router: dict[str, gang_pb2.StepOutput] = {}
        for item in emitted:
            router, sequence_id = item.sequence.key
            if router not in self._routers:
                continue
            message = by_router.get(router)
            if message is None:
                message = by_router[router] = self._message(step, load)
            message.outputs.append(_output(sequence_id, item))
        for router, message in by_router.items():
            self._routers[router].put_nowait(message)

    async def _read(
        self,
        router: str,
        messages: AsyncIterator[gang_pb2.RouterMessage],
        outputs: asyncio.Queue[gang_pb2.StepOutput],
    ) -> None:
        async for message in messages:
            match message.WhichOneof("message"):
                case "submit":
                    self._submit(router, message.submit, outputs)
                case "abort":
                    self._inbox.put(Abort((router, message.abort.sequence_id)))
                case "cancel":
                    cancel = message.cancel
                    sibling = cancel.sibling if cancel.HasField("sibling") else None
                    self._inbox.put(Cancel(router, cancel.tenant, cancel.request_id, sibling))
                case other:
                    log.warning("router %s sent %s after Hello: ignored", router, other)

    def _submit(self, router: str, submit: gang_pb2.Submit, outputs: asyncio.Queue[gang_pb2.StepOutput]) -> None:
        is_other_epoch = submit.epoch != self._header.epoch
        reason = self._other_epoch(submit) if is_other_epoch else self._refusal(submit)
        if reason is None:
            self._inbox.put(Add(_sequence(router, submit)))
            return
        message = self._message(0, None)
        message.outputs.add(
            sequence_id=submit.sequence_id,
            finish_reason=inference_pb2.FINISH_REASON_ERROR,
            detail=reason,
            resubmit=is_other_epoch,
        )
        outputs.put_nowait(message)

    def _other_epoch(self, submit: gang_pb2.Submit) -> str:
        return f"submitted to epoch {submit.epoch}, but the gang is in epoch {self._header.epoch}"

    def _refusal(self, submit: gang_pb2.Submit) -> str | None:
        # Routers validate; this is the last line, where a mistake would corrupt other streams.
        if not submit.prompt_ids:
            return "the prompt is empty"
        if max(submit.prompt_ids) >= self._vocab_size:
            return f"a prompt id is outside the vocabulary of {self._vocab_size}"
        if max(submit.output_ids, default=0) >= self._vocab_size:
            return f"an output id is outside the vocabulary of {self._vocab_size}"
        too_few = submit.max_tokens < (0 if submit.sampling.HasField("prompt_logprobs") else 1)
        if len(submit.prompt_ids) + submit.max_tokens > self._max_model_len or too_few:
            return (
                f"prompt ({len(submit.prompt_ids)} tokens) and max_tokens ({submit.max_tokens}) "
                f"do not fit the context of {self._max_model_len}"
            )
        if submit.output_ids and len(submit.output_ids) >= submit.max_tokens:
            return f"{len(submit.output_ids)} output tokens are there already, and max_tokens is {submit.max_tokens}"
        return None

    def _message(self, step: int, load: gang_pb2.RankLoad | None) -> gang_pb2.StepOutput:
        message = gang_pb2.StepOutput()
        message.CopyFrom(self._header)
        message.step = step
        if load is not None:
            message.load.CopyFrom(load)
        return message


def _sequence(router: str, submit: gang_pb2.Submit) -> Sequence:
    sampling = submit.sampling
    return Sequence(
        key=(router, submit.sequence_id),
        prompt_ids=list(submit.prompt_ids),
        output_ids=list(submit.output_ids),
        sampling=SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            seed=sampling.seed,
            sibling=submit.sibling,
            logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
            prompt_logprobs=sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None,
        ),
        max_tokens=submit.max_tokens,
        min_tokens=submit.min_tokens,
        stop_token_ids=frozenset(submit.stop_token_ids),
        deadline=time.monotonic() + submit.timeout_s if submit.HasField("timeout_s") else None,
        request=(submit.tenant, submit.request_id, submit.sibling),
    )


def _output(sequence_id: int, item: Emitted) -> gang_pb2.SequenceOutput:
    output = gang_pb2.SequenceOutput(
        sequence_id=sequence_id,
        token_ids=[] if item.sample is None else [item.sample.token_id],
        finish_reason=_FINISH[item.finish],
        prompt_logprobs=[_logprobs(position) for position in item.prompt_logprobs],
    )
    if item.sample is not None and item.sample.logprobs is not None:
        output.logprobs.append(_logprobs(item.sample.logprobs))
    if item.is_first:
        # A replayed output may have been in the cache too; it is no part of the prompt.
        output.cached_tokens = min(item.sequence.num_cached_tokens, len(item.sequence.prompt_ids))
    return output


def _logprobs(logprobs: Logprobs) -> inference_pb2.PositionLogprobs:
    token_id, value = logprobs.chosen
    return inference_pb2.PositionLogprobs(
        chosen=inference_pb2.TokenLogprob(token_id=token_id, logprob=value),
        top=[inference_pb2.TokenLogprob(token_id=token, logprob=logprob) for token, logprob in logprobs.top],
    )
