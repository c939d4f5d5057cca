"""Which sequences compute how many tokens in the next step. Plain data, no torch.

Order: sequences that need a single token (decoding) go first, so that a long prompt never holds up a running stream;
the rest of the budget goes to prompts, oldest first, but while anybody decodes long ones get only what keeps the step
short (prompt_limit.py). When blocks run out the youngest running sequence gives its own back and is computed again
later, so the oldest always gets on.

What a prompt shares with earlier sequences is not computed again: each time a prompt is given tokens it first takes the
cached blocks that go on where it stands. Blocks enter the cache when their step is committed.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import partial

from workers.block_pool import KVBlocks
from workers.prompt_limit import PromptLimit, StepWork
from workers.sequence import Logprobs, Sample, Sequence, SequenceKey


class Finish(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    DEADLINE = "deadline"
    ABORT = "abort"
    """By another router than the one that submitted it."""


@dataclass(frozen=True)
class Scheduled:
    """Positions `start` to `end` - 1 of one sequence."""

    sequence: Sequence
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether these are its last known tokens, so that the next one is drawn."""
        return self.end == self.sequence.num_tokens and self.sequence.wants_output


@dataclass(frozen=True)
class Emitted:
    """One new token of one sequence, or its end without one."""

    sequence: Sequence
    sample: Sample | None
    finish: Finish | None
    prompt_logprobs: list[Logprobs]
    """With the first token, where they were asked for."""
    is_first: bool = False
    """It is the first token drawn here."""


def step_work(plan: Iterable[Scheduled]) -> StepWork:
    """What a plan costs, by kind; a prompt's single token costs what any other does."""
    counts = [item.end - item.start for item in plan]
    decoding = counts.count(1)
    return StepWork(decoding, sum(counts) - decoding)


class Scheduler:
    """Sequences wait, run, end. `plan` and `commit` alternate; `add` and `abort` come between them.

    Args:
        max_num_batched_tokens: tokens of a step at most.
        max_num_seqs: sequences that run at once at most; no more than the tokens of a step.
        prefix_cache: keep the blocks of sequences that ended, for others that begin as they did.
        prefill_step_ratio: longest step with prompts longer than a step while others decode, in steps that only decode;
            0: no bound.
    """

    def __init__(
        self,
        blocks: KVBlocks,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        prefix_cache: bool = True,
        prefill_step_ratio: float = 1.5,
    ) -> None:
        self._blocks = blocks
        self._budget, self.max_num_seqs = max_num_batched_tokens, max_num_seqs
        self._prefix_cache = prefix_cache
        self._prompt_limit = PromptLimit(prefill_step_ratio, least=min(blocks.block_size, max_num_batched_tokens))
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._known: dict[SequenceKey, Sequence] = {}
        # Of sequences that were added; one may have ended since.
        self._deadlines: list[tuple[float, SequenceKey]] = []
        self.num_preemptions = 0
        self.prefix_lookup_tokens = 0
        """Tokens of the sequences that were looked up in the cache, since the start."""
        self.prefix_hit_tokens = 0
        """Those of them that did not need to be computed."""

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def pending_tokens(self) -> int:
        """Tokens of all sequences here that are known and not yet computed."""
        return sum(sequence.num_pending_tokens for sequence in self._known.values())

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens the pool of the global layers' blocks holds."""
        return self._blocks.global_.num_blocks * self._blocks.block_size

    @property
    def kv_usage_ratio(self) -> float:
        """0 to 1: the fuller pool of blocks."""
        return self._blocks.usage_ratio

    @property
    def num_cached_blocks(self) -> tuple[int, int]:
        """Blocks of the global and the local pool that later sequences can use again, those in use included."""
        return self._blocks.global_.num_cached, self._blocks.local.num_cached

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the caller has made sure that it could run alone.

        Raises:
            ValueError: its key is in use.
        """
        if sequence.key in self._known:
            raise ValueError(f"sequence {sequence.key} exists already")
        self._known[sequence.key] = sequence
        self._waiting.append(sequence)
        if sequence.deadline is not None:
            heapq.heappush(self._deadlines, (sequence.deadline, sequence.key))
            if len(self._deadlines) > 2 * len(self._known) + 64:  # Most of them ended long before.
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self._known]
                heapq.heapify(self._deadlines)

    def expire(self, now: float) -> list[Emitted]:
        """End the sequences whose deadline has passed, by time.monotonic, and free their blocks."""
        ended = []
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = self._known.get(heapq.heappop(self._deadlines)[1])
            if sequence is not None:
                self.abort(sequence.key)
                ended.append(Emitted(sequence, None, Finish.DEADLINE, []))
        return ended

    def cancel(self, router: str, tenant: str, request_id: str, sibling: int | None) -> list[Emitted]:
        """End what other routers than `router` submitted of a request, and free its blocks.

        Args:
            sibling: only this output of the request; None: all of them.
        """
        found = [
            sequence
            for sequence in self._known.values()
            if sequence.request[:2] == (tenant, request_id)
            and sibling in (None, sequence.request[2])
            and sequence.key[0] != router
        ]
        for sequence in found:
            self.abort(sequence.key)
        return [Emitted(sequence, None, Finish.ABORT, []) for sequence in found]

    def abort(self, key: SequenceKey) -> bool:
        """End a sequence and free its blocks at once; False if it is not here (it may just have finished)."""
        sequence = self._known.get(key)
        if sequence is None:
            return False
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._forget(sequence)
        return True

    def abort_router(self, router: str) -> int:
        """End every sequence of a router that is gone; returns how many."""
        keys = [key for key in self._known if key[0] == router]
        return sum(self.abort(key) for key in keys)

    def plan(self) -> list[Scheduled]:
        """Choose the next step's work and take the blocks for it."""
        self._admit()
        planned: dict[SequenceKey, Scheduled] = {}
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in self._running:
            (decodes if sequence.num_pending_tokens == 1 else prompts).append(sequence)
        budget, prompt_budget = self._budget, 0
        preempted: set[SequenceKey] = set()
        for number, sequence in enumerate(decodes + prompts):
            if number == len(decodes):
                # Those that are planned, not those that wanted to be: a step is never left empty while there is work.
                has_long = any(prompt.num_tokens > self._budget for prompt in prompts)
                prompt_budget = self._prompt_limit.tokens(len(planned), budget) if has_long else budget
                if prompt_budget == 0:
                    break  # nothing left, or a step to measure decoding alone
            if sequence.key in preempted:
                continue
            if budget == 0:
                break
            is_prompt = number >= len(decodes)
            # One that a single step could hold stretches that step alone; only longer ones go on holding up others.
            is_limited = is_prompt and sequence.num_tokens > self._budget
            most = min(budget, prompt_budget) if is_limited else budget
            if most == 0:
                continue
            if is_prompt:
                self._reuse(sequence)
            start = sequence.num_computed_tokens
            end = min(sequence.num_tokens, start + most)
            for victim in self._make_room(sequence, end):
                preempted.add(victim.key)
                # A prompt of one token counts as decoding, and may be younger than a longer one.
                if (undone := planned.pop(victim.key, None)) is not None:
                    budget += undone.end - undone.start
            if sequence.key not in preempted:
                planned[sequence.key] = Scheduled(sequence, start, end)
                budget -= end - start
                prompt_budget -= (end - start) * is_limited
        return list(planned.values())

    def observe(self, works: list[StepWork], index: int, seconds: float) -> None:
        """Learn from a step that is over how long steps take. Without this, nothing limits a step's prompts.

        Args:
            works: what each rank of the gang had in it; after an agreement that nobody has anything, nothing for each.
            index: this rank among them.
            seconds: from its plan to its last token sent.
        """
        self._prompt_limit.observe(works[index], works[:index] + works[index + 1 :], seconds)

    def commit(self, plan: Iterable[Scheduled], samples: Iterable[Sample]) -> list[Emitted]:
        """Take the step's results: `samples` are those of the plan's sampling sequences, in the plan's order."""
        emitted, drawn = [], iter(samples)
        for item in plan:
            sequence, draws = item.sequence, item.samples
            sequence.num_computed_tokens = item.end
            if self._prefix_cache and item.end // self._blocks.block_size > item.start // self._blocks.block_size:
                self._blocks.publish(sequence.blocks, item.start, item.end, self._namer(sequence))
            self._blocks.trim(sequence.blocks, item.end)
            if not draws:
                if not sequence.wants_output and item.end == sequence.num_tokens:
                    self._running.remove(sequence)
                    self._forget(sequence)
                    emitted.append(Emitted(sequence, None, Finish.LENGTH, sequence.prompt_logprobs))
                continue
            sample = next(drawn)
            sequence.output_ids.append(sample.token_id)
            finish = _finish(sequence)
            if finish is not None:
                self._running.remove(sequence)
                self._forget(sequence)
            emitted.append(Emitted(sequence, sample, finish, sequence.prompt_logprobs, not sequence.has_emitted))
            sequence.prompt_logprobs, sequence.has_emitted = [], True
        return emitted

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks and sequences add up; with no sequence, every block is free."""
        self._blocks.check_integrity(sequence.blocks for sequence in self._known.values())
        assert len(self._known) == len(self._running) + len(self._waiting), "a sequence is lost or counted twice"

    def _admit(self) -> None:
        # Only who fits as a whole beside what the others still need, and a block more for each of them: admitting
        # sooner would only preempt it, and what it had computed by then would be lost.
        while self._waiting and len(self._running) < self.max_num_seqs:
            if self._running and not self._has_room(self._waiting[0]):
                return
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            if self._may_reuse(sequence):
                if not sequence.was_preempted:
                    self.prefix_lookup_tokens += sequence.num_tokens
                self._reuse(sequence)

    def _has_room(self, sequence: Sequence) -> bool:
        name = self._namer(sequence) if self._may_reuse(sequence) else None
        need_global, need_local = self._blocks.missing_anew(sequence.num_tokens, self._budget, name)
        if need_global > self._blocks.global_.num_free or need_local > self._blocks.local.num_free:
            return False
        for running in self._running:
            more_global, more_local = self._blocks.missing(running.blocks, running.num_tokens, self._budget)
            need_global, need_local = need_global + more_global + 1, need_local + more_local + 1
        return need_global <= self._blocks.global_.num_free and need_local <= self._blocks.local.num_free

    def _may_reuse(self, sequence: Sequence) -> bool:
        # Log-probabilities of a prompt come from computing it; once they are sent, nothing needs it again.
        return self._prefix_cache and (sequence.sampling.prompt_logprobs is None or bool(sequence.output_ids))

    def _reuse(self, sequence: Sequence) -> None:
        """Take the cached blocks that go on where the sequence stands; its last token is always computed."""
        if not self._may_reuse(sequence):
            return
        computed = self._blocks.reuse(
            sequence.blocks, sequence.num_computed_tokens, sequence.num_tokens - 1, self._namer(sequence)
        )
        if not sequence.was_preempted:
            sequence.num_cached_tokens += computed - sequence.num_computed_tokens
            self.prefix_hit_tokens += computed - sequence.num_computed_tokens
        sequence.num_computed_tokens = computed

    def _namer(self, sequence: Sequence) -> Callable[[int], bytes]:
        return partial(sequence.block_name, self._blocks.block_size)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> list[Sequence]:
        """Grow `sequence`, preempting the youngest until it fits; returns whom (itself last, if it is the youngest)."""
        preempted: list[Sequence] = []
        while not self._blocks.grow(sequence.blocks, num_tokens):
            youngest = self._running.pop()
            self._blocks.release(youngest.blocks)
            youngest.num_computed_tokens = 0
            youngest.was_preempted = True
            self.num_preemptions += 1
            self._waiting.appendleft(youngest)
            preempted.append(youngest)
            if youngest is sequence:
                break
        return preempted

    def _forget(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.blocks)
        del self._known[sequence.key]


def _finish(sequence: Sequence) -> Finish | None:
    if len(sequence.output_ids) >= sequence.min_tokens and sequence.output_ids[-1] in sequence.stop_token_ids:
        return Finish.STOP
    if len(sequence.output_ids) >= sequence.max_tokens:
        return Finish.LENGTH
    return None
