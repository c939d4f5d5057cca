"""One output from a valid request to its end, and what each connection reads of it."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable

from protos import inference_pb2
from router.call import CallInfo
from router.config import RouterConfig
from router.detokenizer import TokenBytes
from router.dispatcher import Dispatcher
from router.errors import Cancelled, Overloaded, TooLate
from router.loss import Loss
from router.metrics import RouterMetrics, StreamTimer
from router.output_text import OutputText
from router.stream import ABORT, DEADLINE, ERROR, Ending, Piece, Reader, Stream
from router.validation import ValidRequest


class Generation:
    """Works on one request, connected to a client or not.

    Raises:
        NotReady: no gang can take the request.
        Overloaded: it may not wait, or would wait too long.
        TooLate: its deadline has passed.

    Args:
        sequence_id: the router's number for it.
        call: the call the request came with.
        on_end: called once, when nothing more will come.
        arrival: when the request came, by time.perf_counter().
    """

    def __init__(
        self,
        sequence_id: int,
        request: ValidRequest,
        call: CallInfo,
        dispatcher: Dispatcher,
        token_bytes: TokenBytes,
        config: RouterConfig,
        metrics: RouterMetrics,
        on_end: Callable[["Generation"], None],
        arrival: float,
    ) -> None:
        self.request = request
        self._dispatcher = dispatcher
        self._config = config
        self._on_end = on_end
        self._metrics = metrics
        self._expiry: asyncio.TimerHandle | None = None
        self._is_started = False
        within_s = _within(request, call)
        text = OutputText(token_bytes, request.stop, request.min_tokens)
        deadline = None if within_s is None else time.monotonic() + within_s
        self.stream = Stream(sequence_id, request, text, self._took, self._ended, self._lost, deadline)
        # The last one comes again: whatever it ends, it ends here too. Log-probabilities are not known of any.
        if not request.sampling.HasField("logprobs"):
            self.stream.take_up(request.resume_token_ids[:-1])
        if within_s is not None and within_s <= 0:
            raise TooLate("the deadline had passed when the request arrived")
        self._timer = StreamTimer(metrics, arrival)
        try:
            self._ticket = dispatcher.submit(self.stream, within_s, call, self._started)
        except Exception:
            self._timer.refused()
            raise
        self._timer.accepted(len(request.prompt_ids))
        if within_s is not None and self.stream.ending is None:
            self._expiry = asyncio.get_running_loop().call_later(within_s, self._expire, within_s)

    @property
    def is_over(self) -> bool:
        """Nothing more will come."""
        return self.stream.ending is not None

    @property
    def weight(self) -> int:
        """What keeping the output takes: its tokens and alternative log-probabilities."""
        asked = self.request.sampling
        kept = len(self.stream.output_ids) * (1 + asked.logprobs)
        return kept + (len(self.request.prompt_ids) * (1 + asked.prompt_logprobs) if asked.prompt_logprobs else 0)

    def connect(self, offset: int) -> Reader:
        """A connection's reader; an earlier connection gets nothing more.

        Args:
            offset: tokens its client has.
        """
        if offset:
            self._metrics.resumed.inc()
        return self.stream.read_from(offset)

    async def responses(self, reader: Reader) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """What a connection sends. The last one says how the output ended.

        Raises:
            CaravanError: after the last one, where it did not end well.
        """
        is_first = True
        while True:
            try:
                piece = await reader.read(self._config.max_tokens_per_message, self._config.stream_stall_s)
            except TimeoutError:
                self._stall()
                continue
            if piece is None:
                break
            response = self._respond(piece)
            if is_first:
                is_first = False
                response.request_id = self.request.request_id
                response.seed = self.request.sampling.seed
                response.chat_time = self.request.chat_time
            ending = piece.ending
            if ending is not None and ending.error is not None and not self._is_started and not piece.token_ids:
                raise ending.error  # Nothing was done for it: there is nothing to tell but why.
            yield response
            if ending is not None and ending.error is not None:
                raise ending.error

    def abort(self) -> None:
        """The client went away."""
        self.stream.end(ABORT, Cancelled("the client went away"))

    def cancel(self) -> None:
        """Somebody ended the request by its id."""
        self.stream.end(ABORT, Cancelled("the request was cancelled"))

    def _respond(self, piece: Piece) -> inference_pb2.GenerateResponse:
        response = inference_pb2.GenerateResponse(
            text=piece.text,
            token_ids=piece.token_ids,
            logprobs=piece.logprobs,
            prompt_logprobs=piece.prompt_logprobs,
        )
        if piece.ending is not None:
            response.finish_reason = piece.ending.reason
            response.usage.prompt_tokens = len(self.request.prompt_ids)
            response.usage.completion_tokens = len(self.stream.output_ids)
            response.usage.cached_tokens = self.stream.cached_tokens
            if piece.ending.error is not None:
                response.detail = piece.ending.error.message
        return response

    def _started(self) -> None:
        self._is_started = True
        self._timer.started()

    def _took(self, tokens: int) -> None:
        is_first = len(self.stream.output_ids) <= tokens
        self._dispatcher.served(tokens + (len(self.request.prompt_ids) if is_first else 0))
        self._timer.tokens(tokens)
        if (gap_s := self._ticket.item.progress()) is not None:
            self._metrics.replay_gap.observe(gap_s)

    def _lost(self, loss: Loss) -> None:
        self._dispatcher.lost(self._ticket, loss)

    def _ended(self) -> None:
        ending = self.stream.ending
        assert ending is not None
        if self._expiry is not None:
            self._expiry.cancel()
        used = len(self.request.prompt_ids) + len(self.stream.output_ids)
        self._dispatcher.end(self._ticket, used, ending.is_complete)
        self._timer.end(*_outcome(ending))
        self._on_end(self)

    def _expire(self, within_s: float) -> None:
        where = "while it was worked on" if self._is_started else "while it waited for a rank"
        if self._is_started and self._ticket.item.link is None:
            where = "while it waited for another rank, its own being lost"
        self.stream.end(DEADLINE, TooLate(f"the request's deadline of {within_s:.3g} s passed {where}"))

    def _stall(self) -> None:
        seconds = self._config.stream_stall_s
        link = self._ticket.item.link
        if link is None:
            self.stream.end(ERROR, Overloaded(f"no rank had room in {seconds:g} s; send the request again", seconds))
        else:
            self.stream.fail(f"{link} sent no token in {seconds:g} s; send the request again")


def _within(request: ValidRequest, call: CallInfo) -> float | None:
    """Seconds the request has. A resumable one outlives its connection, and so the connection's deadline."""
    bounds = [request.timeout_s, None if request.resumable else call.deadline_s]
    return min((bound for bound in bounds if bound is not None), default=None)


def _outcome(ending: Ending) -> tuple[str, str]:
    """Finish reason and gRPC status, for the metrics."""
    reason = inference_pb2.FinishReason.Name(ending.reason).removeprefix("FINISH_REASON_").lower()
    return reason, "OK" if ending.error is None else ending.error.code.name
