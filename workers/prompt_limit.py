"""How many tokens of long prompts a step may carry while streams run, so that these keep their pace. No torch.

All ranks step together, so a prompt on one holds up the streams of all. The limit is therefore of the whole gang, made
from what every rank knows of the step before: each measures what a step takes that only decodes, and what a prompt
token adds to it, and takes its share of the prompt tokens that keep a step within `ratio` times the former.

What a token adds falls with their number where few-token experts are bound by memory, and grows with the context. So it
is measured where it is used, in the last few steps that mixed both, and the number at most doubles from there. Medians
keep out a step that something else held up.
"""

from collections import deque
from dataclasses import dataclass
from statistics import median

PURE_STEPS = 5
"""Steps without prompts that are remembered."""
MIXED_STEPS = 7
"""Steps with both that are remembered."""
PROBE_STEPS = 64
"""After so many steps with both, prompts pause for one, to measure again what decoding alone takes."""


@dataclass(frozen=True)
class StepWork:
    """What one rank has in a step, in tokens."""

    decode_tokens: int = 0
    """Of sequences that needed a single one: running streams."""
    prompt_tokens: int = 0
    """Of sequences that are further behind."""

    @property
    def tokens(self) -> int:
        return self.decode_tokens + self.prompt_tokens


class PromptLimit:
    """Learns from steps that are over how many prompt tokens the next may carry.

    Args:
        ratio: longest step with prompts, in steps that only decode; more than 1, or 0 for no limit.
        least: tokens a rank may always compute, so that prompts get on.
    """

    def __init__(self, ratio: float, least: int) -> None:
        self._ratio, self._least = ratio, least
        self._pure: deque[tuple[int, float]] = deque(maxlen=PURE_STEPS)
        """Decoded tokens and seconds of steps without prompts."""
        self._mixed: deque[tuple[int, float]] = deque(maxlen=MIXED_STEPS)
        """Prompt tokens, and seconds that each of them added."""
        self._others: list[StepWork] = []
        """What each other rank had in the last step."""
        self._sharing = 1
        """Ranks with prompts in the last step with both."""
        self._since_pure: int | None = None
        """Steps with both since one without prompts; None: nobody measures, so nothing is limited."""

    def tokens(self, decoding: int, budget: int) -> int:
        """Prompt tokens this rank may compute in the next step, at most `budget`.

        Args:
            decoding: its own sequences that decode.
        """
        rows = decoding + sum(work.decode_tokens for work in self._others)
        if rows == 0 or self._ratio == 0 or self._since_pure is None:
            return budget
        # Who does not decode has something to do all the same: a step that nobody has anything for would be the last.
        if self._since_pure >= PROBE_STEPS and decoding:
            return 0
        sharing = max(self._sharing, 1 + sum(work.prompt_tokens > 0 for work in self._others))
        return min(budget, max(self._least, int(self._allowed(rows) / sharing)))

    def observe(self, own: StepWork, others: list[StepWork], seconds: float) -> None:
        """Learn from a step.

        Args:
            own: what this rank had in it.
            others: what each other rank had.
            seconds: its wall time.
        """
        if self._since_pure is None:
            # The first step that could have both measures what decoding alone takes.
            self._since_pure = PROBE_STEPS
        self._others, works = others, [own, *others]
        rows, prompt_tokens = sum(work.decode_tokens for work in works), sum(work.prompt_tokens for work in works)
        if rows == 0:
            return
        if prompt_tokens == 0:
            self._pure.append((rows, seconds))
            self._since_pure = 0
            return
        # A pause that another rank did not keep is tried again later.
        self._since_pure = self._since_pure + 1 if self._since_pure < PROBE_STEPS else 0
        self._sharing = sum(work.prompt_tokens > 0 for work in works)
        if self._pure:
            self._mixed.append((prompt_tokens, max(0.0, seconds - self._decode_seconds(rows)) / prompt_tokens))

    def _allowed(self, rows: int) -> float:
        """Prompt tokens of the whole gang."""
        if not self._mixed:
            return self._least
        most = 2.0 * max(tokens for tokens, _ in self._mixed)
        added = self._token_seconds()
        return most if added == 0 else min(most, (self._ratio - 1) * self._decode_seconds(rows) / added)

    def _decode_seconds(self, rows: int) -> float:
        """What a step of `rows` decoded tokens takes at least: what one of fewer takes, or its share of one of more."""
        return median(seconds * min(1.0, rows / of_rows) for of_rows, seconds in self._pure)

    def _token_seconds(self) -> float:
        """Seconds that a prompt token adds: the median over tokens."""
        half = sum(tokens for tokens, _ in self._mixed) / 2
        for tokens, seconds in sorted(self._mixed, key=lambda step: step[1]):
            half -= tokens
            if half <= 0:
                return seconds
        raise AssertionError("the last one reaches the half")
