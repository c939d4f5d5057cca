"""Which sequences compute how many tokens in the next step. Plain data, no torch.

Order: sequences that need a single token (decoding) go first, so that a long prompt never holds up a running stream;
the rest of the budget goes to prompts, oldest first. When blocks run out the youngest running sequence gives its own
back and is computed again later, so the oldest always gets on.
"""

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from workers.block_pool import KVBlocks
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


class Scheduler:
    """Sequences wait, run, end. `plan` and `commit` alternate; `add` and `abort` come between them.

    Args:
        max_num_batched_tokens: tokens of a step at most.
        max_num_seqs: sequences that run at once at most; no more than the tokens of a step.
    """

    def __init__(self, blocks: KVBlocks, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        self._blocks = blocks
        self._budget, self.max_num_seqs = max_num_batched_tokens, max_num_seqs
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._known: dict[SequenceKey, Sequence] = {}
        # Of sequences that were added; one may have ended since.
        self._deadlines: list[tuple[float, SequenceKey]] = []
        self.num_preemptions = 0

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
        budget = self._budget
        order = [s for s in self._running if s.num_pending_tokens == 1]
        order += [s for s in self._running if s.num_pending_tokens > 1]
        preempted: set[SequenceKey] = set()
        for sequence in order:
            if budget == 0:
                break
            if sequence.key in preempted:
                continue
            start = sequence.num_computed_tokens
            end = start + min(sequence.num_pending_tokens, budget)
            for victim in self._make_room(sequence, end):
                preempted.add(victim.key)
                if (undone := planned.pop(victim.key, None)) is not None:
                    budget += undone.end - undone.start
            if sequence.key not in preempted:
                planned[sequence.key] = Scheduled(sequence, start, end)
                budget -= end - start
        return list(planned.values())

    def commit(self, plan: Iterable[Scheduled], samples: Iterable[Sample]) -> list[Emitted]:
        """Take the step's results: `samples` are those of the plan's sampling sequences, in the plan's order."""
        emitted, drawn = [], iter(samples)
        for item in plan:
            sequence, draws = item.sequence, item.samples
            sequence.num_computed_tokens = item.end
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
            emitted.append(Emitted(sequence, sample, finish, sequence.prompt_logprobs))
            sequence.prompt_logprobs = []
        return emitted

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks and sequences add up; with no sequence, every block is free."""
        self._blocks.check_integrity()
        assert len(self._known) == len(self._running) + len(self._waiting), "a sequence is lost or counted twice"
        for pool, name in ((self._blocks.global_, "global_"), (self._blocks.local, "local")):
            held = sum(len(getattr(sequence.blocks, name).blocks) for sequence in self._known.values())
            assert held == pool.num_blocks - pool.num_free, f"{name} blocks are held by nobody"

    def _admit(self) -> None:
        # A block is kept back for every running sequence: admitting more than can take a step would only preempt them.
        free = min(self._blocks.global_.num_free, self._blocks.local.num_free) - len(self._running)
        while self._waiting and len(self._running) < self.max_num_seqs:
            first_tokens = min(self._waiting[0].num_pending_tokens, self._budget)
            free -= -(-first_tokens // self._blocks.block_size)
            if self._running and free < 0:
                return
            self._running.append(self._waiting.popleft())

    def _make_room(self, sequence: Sequence, num_tokens: int) -> list[Sequence]:
        """Grow `sequence`, preempting the youngest until it fits; returns whom (itself last, if it is the youngest)."""
        preempted: list[Sequence] = []
        while not self._blocks.grow(sequence.blocks, num_tokens):
            youngest = self._running.pop()
            self._blocks.release(youngest.blocks)
            youngest.num_computed_tokens = 0
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
