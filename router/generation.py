"""One answer: from a valid request to the messages its client reads."""

from protos import inference_pb2
from router.config import RouterConfig
from router.detokenizer import TokenBytes
from router.errors import RankLost
from router.gangs import Gangs
from router.metrics import StreamTimer
from router.output_text import OutputText
from router.stream import Chunk, Stream
from router.validation import ValidRequest

UNSPECIFIED = inference_pb2.FINISH_REASON_UNSPECIFIED
STOP = inference_pb2.FINISH_REASON_STOP
ERROR = inference_pb2.FINISH_REASON_ERROR


class Generation:
    """Submits a request and turns what comes back into responses. `close` it, whatever happens.

    Attributes:
        error: set with the last response when the generation failed: the status to end the call with.

    Raises:
        NotReady: no rank can take the request; nothing was sent.
    """

    def __init__(
        self, request: ValidRequest, gangs: Gangs, token_bytes: TokenBytes, config: RouterConfig, timer: StreamTimer
    ) -> None:
        self.error: RankLost | None = None
        self._request = request
        self._config = config
        self._timer = timer
        text = OutputText(token_bytes, request.stop, request.min_tokens)
        self._stream = Stream(gangs.next_sequence_id(), request, text, timer.tokens)
        self._link = gangs.submit(self._stream)
        self._is_first = True
        self._is_over = False
        timer.accepted(len(request.prompt_ids))

    async def next(self) -> inference_pb2.GenerateResponse | None:
        """The next response; None after the last."""
        if self._is_over:
            return None
        try:
            chunk = await self._stream.take(self._config.max_tokens_per_message, self._config.stream_stall_s)
        except TimeoutError:
            detail = f"{self._link} sent no token in {self._config.stream_stall_s:g} s; send the request again"
            chunk = Chunk(finish_reason=ERROR, detail=detail)
        response = self._respond(chunk)
        if self._is_first:
            self._is_first = False
            response.request_id = self._request.request_id
            response.seed = self._request.sampling.seed
        return response

    def close(self) -> None:
        """Ends the work at the rank, if it has not ended. Never waits."""
        self._link.abort(self._stream.sequence_id)

    def _respond(self, chunk: Chunk) -> inference_pb2.GenerateResponse:
        finish_reason = chunk.finish_reason
        text = self._stream.text
        # The token that ended the sequence is sent, but it is not text.
        unseen = finish_reason == STOP and chunk.token_ids and chunk.token_ids[-1] in self._request.stop_token_ids
        visible = chunk.token_ids[:-1] if unseen else chunk.token_ids
        shown, taken = text.push(visible)
        if text.is_stopped():
            finish_reason = STOP
        else:
            taken = len(chunk.token_ids)
            if finish_reason != UNSPECIFIED:
                shown += text.finish()
                finish_reason = STOP if text.is_stopped() else finish_reason
        response = inference_pb2.GenerateResponse(
            text=shown,
            token_ids=chunk.token_ids[:taken],
            logprobs=chunk.logprobs[:taken],
            prompt_logprobs=chunk.prompt_logprobs,
        )
        if finish_reason != UNSPECIFIED:
            self._end(response, finish_reason, chunk.detail, text.num_tokens + bool(unseen and not text.is_stopped()))
        return response

    def _end(
        self,
        response: inference_pb2.GenerateResponse,
        finish_reason: inference_pb2.FinishReason.ValueType,
        detail: str,
        completion_tokens: int,
    ) -> None:
        self._is_over = True
        response.finish_reason = finish_reason
        response.usage.prompt_tokens = len(self._request.prompt_ids)
        response.usage.completion_tokens = completion_tokens
        self._timer.finish_reason = (
            inference_pb2.FinishReason.Name(finish_reason).removeprefix("FINISH_REASON_").lower()
        )
        if finish_reason == ERROR:
            response.detail = detail
            self.error = RankLost(detail)
        self.close()
