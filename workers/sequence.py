"""One sequence of tokens under generation. Plain data, no torch."""

from dataclasses import dataclass, field

from protos.block_hash import block_hash, root_hash
from workers.block_pool import SequenceBlocks

RequestKey = tuple[str, str, int]
"""(tenant, the client's id of the request, sibling)."""
SequenceKey = tuple[str, int]
"""(router, the router's number for the stream)."""

_ROOT = root_hash()


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn; nothing is left to default here, the router has resolved it."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    """64 bits. With `sibling` and the position it is the key of every draw."""
    sibling: int = 0
    logprobs: int | None = None
    """Alternatives returned beside the chosen token's log-probability; None: no log-probabilities."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(eq=False)
class Sequence:
    """Prompt and output stay apart: penalties, `min_tokens` and budgets depend on which is which.

    There are no phases: a sequence is behind by `num_tokens - num_computed_tokens`, and every step catches up.
    """

    key: SequenceKey
    prompt_ids: list[int]
    sampling: SamplingParams
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    output_ids: list[int] = field(default_factory=list)
    deadline: float | None = None
    """When it ends, done or not, by time.monotonic; None: no bound."""
    request: RequestKey = ("", "", 0)
    """What other routers know the request by; without an id they do not."""
    num_computed_tokens: int = 0
    blocks: SequenceBlocks = field(default_factory=SequenceBlocks)
    prompt_logprobs: list["Logprobs"] = field(default_factory=list)
    """Entry i is of prompt token i + 1; filled as the prompt is computed, taken with the first output."""
    num_cached_tokens: int = 0
    """Tokens that were there when they were first needed: another sequence had computed them."""
    was_preempted: bool = False
    """It gave its blocks back once and is computed again; what it finds in the cache may be its own."""
    has_emitted: bool = False
    """A token of it was drawn here."""
    block_names: list[bytes] = field(default_factory=list)
    """Of its first blocks, as far as somebody asked."""

    @property
    def wants_output(self) -> bool:
        """False: only the prompt's log-probabilities are asked for."""
        return self.max_tokens > 0

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_pending_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    def tokens(self, start: int, end: int) -> list[int]:
        """Ids at positions `start` to `end` - 1."""
        prompt = len(self.prompt_ids)
        if start >= prompt:
            return self.output_ids[start - prompt : end - prompt]
        return self.prompt_ids[start:end] + self.output_ids[: max(0, end - prompt)]

    def block_name(self, block_size: int, number: int) -> bytes:
        """Name of block `number`, all of whose tokens are known; hashed the first time (protos/block_hash.py)."""
        names = self.block_names
        while len(names) <= number:
            start = len(names) * block_size
            names.append(block_hash(names[-1] if names else _ROOT, self.tokens(start, start + block_size)))
        return names[number]


@dataclass(frozen=True)
class Logprobs:
    """Of one output position, natural logarithms."""

    chosen: tuple[int, float]
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Sample:
    """What the sampler drew for one sequence."""

    token_id: int
    logprobs: Logprobs | None = None
