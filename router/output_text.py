"""From a stream's tokens to the text its client sees."""

from collections.abc import Sequence

from router.detokenizer import Detokenizer, TokenBytes
from router.stop import StopMatcher, StopStrings


class OutputText:
    """Detokenization and stop strings of one output.

    Attributes:
        num_tokens: tokens taken so far; after a stop string, the one that completed it is the last.
    """

    def __init__(self, token_bytes: TokenBytes, stop: Sequence[str], min_tokens: int) -> None:
        self._detokenizer = Detokenizer(token_bytes)
        self._matcher = StopMatcher(StopStrings(stop)) if stop else None
        self._min_tokens = min_tokens
        self.num_tokens = 0

    def is_stopped(self) -> bool:
        """A stop string ended the output."""
        return self._matcher is not None and self._matcher.stopped

    def push(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Takes tokens in order, up to the one that completes a stop string.

        Returns:
            The text that may be shown now, and how many of the tokens were taken.
        """
        if self._matcher is None:
            self.num_tokens += len(token_ids)
            return self._detokenizer.push(token_ids), len(token_ids)
        pieces = []
        for taken, token_id in enumerate(token_ids, start=1):
            self.num_tokens += 1
            text = self._detokenizer.push((token_id,))
            pieces.append(self._matcher.push(text, self.num_tokens >= self._min_tokens))
            if self._matcher.stopped:
                return "".join(pieces), taken
        return "".join(pieces), len(token_ids)

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        rest = self._detokenizer.finish()
        if self._matcher is None:
            return rest
        shown = self._matcher.push(rest, self.num_tokens >= self._min_tokens)
        return shown if self._matcher.stopped else shown + self._matcher.finish()
