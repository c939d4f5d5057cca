"""One client's stream at one rank."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from protos import gang_pb2, inference_pb2
from router.output_text import OutputText
from router.validation import ValidRequest


@dataclass
class Chunk:
    """What arrived since the last one was taken."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[inference_pb2.PositionLogprobs] = field(default_factory=list)
    finish_reason: inference_pb2.FinishReason.ValueType = inference_pb2.FINISH_REASON_UNSPECIFIED
    """Set with the last tokens."""
    prompt_logprobs: list[inference_pb2.PositionLogprobs] = field(default_factory=list)
    """With the first tokens, when asked for."""
    detail: str = ""
    """With FINISH_REASON_ERROR: one sentence."""


class Stream:
    """All that is known of a stream: what it takes to generate it again elsewhere, and what its client has yet to get.

    The rank's side never waits for the client's: what a slow client has not taken is one growing chunk, bounded by
    the request's own max_tokens.

    Attributes:
        sequence_id: the router's number for it, never used twice.
        request: prompt ids, parameters and seed.
        output_ids: all tokens the rank sent, apart from the prompt's.
        text: detokenization, with the text held back.
    """

    def __init__(
        self, sequence_id: int, request: ValidRequest, text: OutputText, on_tokens: Callable[[int], None]
    ) -> None:
        self.sequence_id = sequence_id
        self.request = request
        self.text = text
        self.output_ids: list[int] = []
        self._on_tokens = on_tokens
        self._pending = Chunk()
        self._arrived = asyncio.Event()

    @property
    def is_finished(self) -> bool:
        """The last tokens, or the failure, have arrived."""
        return self._pending.finish_reason != inference_pb2.FINISH_REASON_UNSPECIFIED

    def deliver(self, output: gang_pb2.SequenceOutput) -> None:
        """Takes what a step produced. Never waits."""
        if self.is_finished:
            return
        if output.token_ids:
            self.output_ids.extend(output.token_ids)
            self._on_tokens(len(output.token_ids))
        pending = self._pending
        pending.token_ids.extend(output.token_ids)
        pending.logprobs.extend(output.logprobs)
        pending.prompt_logprobs.extend(output.prompt_logprobs)
        pending.finish_reason = output.finish_reason
        pending.detail = output.detail
        self._arrived.set()

    def fail(self, detail: str) -> None:
        """Ends the stream because its rank cannot go on. Tokens that arrived before still reach the client."""
        if not self.is_finished:
            self._pending.finish_reason = inference_pb2.FINISH_REASON_ERROR
            self._pending.detail = detail
            self._arrived.set()

    async def take(self, most: int, timeout_s: float) -> Chunk:
        """Waits for something to arrive and takes it.

        Args:
            most: tokens to take at most; the rest stays.
            timeout_s: seconds to wait.

        Raises:
            TimeoutError: nothing arrived.
        """
        if not self._arrived.is_set():
            async with asyncio.timeout(timeout_s):
                await self._arrived.wait()
        pending = self._pending
        if len(pending.token_ids) > most:
            chunk = Chunk(pending.token_ids[:most], pending.logprobs[:most], prompt_logprobs=pending.prompt_logprobs)
            del pending.token_ids[:most], pending.logprobs[:most]
            pending.prompt_logprobs = []
            return chunk
        self._arrived.clear()
        # What is left says how the stream ended, so that nothing more is taken in.
        self._pending = Chunk(finish_reason=pending.finish_reason, detail=pending.detail)
        return pending
