"""One output: what a rank sent of it, and what its client has yet to get."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protos import gang_pb2, inference_pb2
from protos.errors import CaravanError
from router.errors import Cancelled, InvalidRequest, RankLost, TakenOver, TooLate
from router.loss import Loss
from router.output_text import OutputText
from router.validation import ValidRequest

UNSPECIFIED = inference_pb2.FINISH_REASON_UNSPECIFIED
STOP = inference_pb2.FINISH_REASON_STOP
LENGTH = inference_pb2.FINISH_REASON_LENGTH
ABORT = inference_pb2.FINISH_REASON_ABORT
ERROR = inference_pb2.FINISH_REASON_ERROR
DEADLINE = inference_pb2.FINISH_REASON_DEADLINE


@dataclass(frozen=True)
class Ending:
    """How an output ended."""

    reason: inference_pb2.FinishReason.ValueType
    error: CaravanError | None = None
    """What its call ends with, where that is not well."""

    @property
    def is_complete(self) -> bool:
        """It came to its own end: nothing would follow."""
        return self.error is None


@dataclass
class Piece:
    """What a reader takes at once."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[inference_pb2.PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[inference_pb2.PositionLogprobs] = field(default_factory=list)
    ending: Ending | None = None
    """With the last one."""


class Stream:
    """All that is known of an output, also what it takes to generate it again elsewhere.

    The rank's side never waits for the client's: what a slow client has not read stays here, bounded by the request's
    own max_tokens. The text shown after k tokens is a function of these k alone, so that an output can be read on from
    any of its tokens, here or where it is generated again.

    Attributes:
        sequence_id: the router's number for it at its rank, never used twice; at the next rank it has another.
        request: prompt ids, parameters and seed.
        deadline: when it must end, by time.monotonic; None: no bound.
        output_ids: all tokens so far, apart from the prompt's; after a stop string, the one that completed it is last.
        ending: how it ended; None while it goes on.
        is_rank_done: the rank itself ended it.
        dtype: what its tokens are computed in, once it was at a rank; it is replayed in no other.
        cached_tokens: of the prompt's tokens, those that the rank did not need to compute.

    Args:
        on_tokens: told of every arrival how many tokens came.
        on_end: called once.
        on_lost: called when its rank is lost and it could go on at another.
    """

    def __init__(
        self,
        sequence_id: int,
        request: ValidRequest,
        text: OutputText,
        on_tokens: Callable[[int], None],
        on_end: Callable[[], None],
        on_lost: Callable[[Loss], None],
        deadline: float | None = None,
    ) -> None:
        self.sequence_id = sequence_id
        self.request = request
        self.deadline = deadline
        self.output_ids: list[int] = []
        self.ending: Ending | None = None
        self.is_rank_done = False
        self.cached_tokens = 0
        self.dtype = ""
        self._text = text
        self._on_tokens = on_tokens
        self._on_end = on_end
        self._on_lost = on_lost
        # One entry a token from number `_dropped` on: what it adds to the text, and its log-probabilities if asked for.
        self._dropped = 0
        self._pieces: list[str] = []
        self._logprobs: list[inference_pb2.PositionLogprobs] = []
        self._prompt_logprobs: list[inference_pb2.PositionLogprobs] = []
        self._tail = ""
        self._reader: Reader | None = None

    def deliver(self, output: gang_pb2.SequenceOutput) -> None:
        """Takes what a step produced. Never waits."""
        if self.ending is not None:
            return
        if not self.output_ids:  # What a later rank says of the prompt comes too late.
            self._prompt_logprobs.extend(output.prompt_logprobs)
            self.cached_tokens = output.cached_tokens
        self._logprobs.extend(output.logprobs)
        reason = UNSPECIFIED if output.resubmit else output.finish_reason
        self.is_rank_done = reason != UNSPECIFIED
        ids = output.token_ids
        if ids:
            for i, token_id in enumerate(ids):
                self.output_ids.append(token_id)
                # The token that ended the sequence is sent, but it is not text.
                is_hidden = reason == STOP and i == len(ids) - 1 and token_id in self.request.stop_token_ids
                self._pieces.append("" if is_hidden else self._text.push((token_id,))[0])
                if self._text.is_stopped():
                    reason = STOP
                    break
            self._on_tokens(len(ids))
        if reason == UNSPECIFIED:
            self._wake()
        elif reason in (STOP, LENGTH):
            self._complete(reason)
        elif reason == DEADLINE:
            self.end(reason, TooLate("the request's deadline passed while it was worked on"))
        elif reason == ABORT:
            self.end(reason, Cancelled("the request was cancelled, or is resumed at another router"))
        else:
            self.end(ERROR, RankLost(output.detail))

    def take_up(self, token_ids: Sequence[int]) -> None:
        """Begin after tokens that the client has from another router.

        Raises:
            InvalidRequest: the output would have ended before.
        """
        for token_id in token_ids:
            self.output_ids.append(token_id)
            self._pieces.append(self._text.push((token_id,))[0])
            if self._text.is_stopped() or token_id in self.request.stop_token_ids:
                raise InvalidRequest("resume_token_ids", "go on after what ends the answer")

    def lose(self, loss: Loss) -> None:
        """Its rank does not go on with it. What arrived counts; nothing else of that rank will be taken for it."""
        if self.ending is not None:
            return
        if 0 < self.request.max_tokens <= len(self.output_ids):
            self._complete(LENGTH)
        else:
            self._on_lost(loss)

    def renumber(self, sequence_id: int) -> None:
        """It goes to another rank, under a new number."""
        self.sequence_id = sequence_id

    def fail(self, detail: str) -> None:
        """Ends the output because no rank can go on. Tokens that arrived before still reach the client."""
        self.end(ERROR, RankLost(detail))

    def refuse(self, error: CaravanError) -> None:
        """Ends the output for a reason of the router's own."""
        self.end(ERROR, error)

    def end(self, reason: inference_pb2.FinishReason.ValueType, error: CaravanError | None = None) -> None:
        """Ends the output, if it has not ended. Text held back stays so: it may become part of a stop string."""
        if self.ending is None:
            self.ending = Ending(reason, error)
            self._wake()
            self._on_end()

    def read_from(self, offset: int) -> "Reader":
        """Who reads the output from now on; an earlier reader gets nothing more.

        Args:
            offset: tokens not to be read.
        """
        reader = Reader(self, offset)
        earlier, self._reader = self._reader, reader
        if earlier is not None:
            earlier.wake()
        return reader

    def is_read_by(self, reader: "Reader") -> bool:
        """No other one came after."""
        return self._reader is reader

    def take(self, offset: int, most: int) -> Piece:
        """What there is after `offset` tokens, up to `most` of them."""
        start, end = offset - self._dropped, min(offset + most, len(self.output_ids)) - self._dropped
        piece = Piece(self.output_ids[offset : end + self._dropped], "".join(self._pieces[start:end]))
        piece.logprobs = self._logprobs[start:end]
        if offset == 0:
            piece.prompt_logprobs = self._prompt_logprobs
        if end + self._dropped >= len(self.output_ids):
            piece.ending = self.ending
            # Who has the last token has what came with it.
            if self.ending is not None and (start < end or not self.output_ids):
                piece.text += self._tail
        return piece

    def drop(self, count: int) -> None:
        """Nobody will read the first `count` tokens again."""
        del self._pieces[: count - self._dropped], self._logprobs[: count - self._dropped]
        self._dropped = count
        self._prompt_logprobs = []

    def _complete(self, reason: inference_pb2.FinishReason.ValueType) -> None:
        if not self._text.is_stopped():
            self._tail = self._text.finish()
            if self._text.is_stopped():  # What was half a character completes a stop string.
                reason = STOP
        self.end(reason)

    def _wake(self) -> None:
        if self._reader is not None:
            self._reader.wake()


class Reader:
    """One connection's way through an output."""

    def __init__(self, stream: Stream, offset: int) -> None:
        self._stream = stream
        self._cursor = offset
        self._news = asyncio.Event()
        self._is_over = False

    def wake(self) -> None:
        """Something changed."""
        self._news.set()

    async def read(self, most: int, timeout_s: float) -> Piece | None:
        """Waits for something new and takes it; None after the last.

        Args:
            most: tokens to take at most; the rest stays.
            timeout_s: seconds to wait.

        Raises:
            TimeoutError: nothing came.
            TakenOver: another reader came.
            InvalidRequest: the output ended before the offset.
        """
        stream = self._stream
        if self._is_over:
            return None
        while stream.is_read_by(self) and stream.ending is None and len(stream.output_ids) <= self._cursor:
            self._news.clear()
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        if not stream.is_read_by(self):
            raise TakenOver("another connection resumed this request; it gets the rest")
        if self._cursor > len(stream.output_ids):
            if stream.ending is not None and stream.ending.error is not None:
                raise stream.ending.error
            raise InvalidRequest("resume_offset", f"{self._cursor}; the answer has {len(stream.output_ids)} tokens")
        piece = stream.take(self._cursor, most)
        self._cursor += len(piece.token_ids)
        self._is_over = piece.ending is not None
        if not stream.request.resumable:
            stream.drop(self._cursor)
        return piece
