"""The step loop with the real model: many at once, aborts, preemption, parking, failure."""

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import MAVERICK, edit_config, write
from tests.exactness import Exactness, Reference, Written
from tests.local_engine import LocalRank, engine_config, greedy, prompt
from workers.engine import Engine
from workers.errors import ExchangeError
from workers.exchange import LocalExchange
from workers.inbox import Abort, Add, RouterGone
from workers.scheduler import Emitted, Finish
from workers.sequence import SamplingParams, Sequence

# Bytes of one block of 16 tokens in all 8 layers of the small checkpoints.
BLOCK = 8 * 2 * 2 * 16 * 4 * 16


class Collected:
    """What an engine published, by sequence."""

    def __init__(self) -> None:
        self.tokens: dict[Any, list[int]] = {}
        self.finished: dict[Any, Finish] = {}
        self.steps: list[int] = []
        self._changed = threading.Condition()

    def publish(self, step: int, emitted: list[Emitted]) -> None:
        with self._changed:
            self.steps.append(step)
            keys = [item.sequence.key for item in emitted]
            assert len(set(keys)) == len(keys)
            for item in emitted:
                assert item.sequence.key not in self.finished, "a token after the last one"
                self.tokens.setdefault(item.sequence.key, []).append(item.sample.token_id)
                if item.finish is not None:
                    self.finished[item.sequence.key] = item.finish
            self._changed.notify_all()

    def wait(self, condition: Any, timeout_s: float = 60) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), timeout_s), "the engine got stuck"


class Running:
    """An engine in its own thread."""

    def __init__(self, rank: LocalRank) -> None:
        self.rank = rank
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> LocalRank:
        self.thread.start()
        return self.rank

    def __exit__(self, *_: object) -> None:
        self.rank.inbox.stop()
        self.thread.join(10)
        assert not self.thread.is_alive(), "the engine did not stop"
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        torch.set_num_threads(1)
        try:
            self.rank.engine.run()
        except BaseException as error:
            self.failure = error


def outputs_alone(written: Written, sequences: list[Sequence]) -> list[list[int]]:
    rank = LocalRank(engine_config(written.folder))
    return [rank.generate([sequence])[0] for sequence in sequences]


def test_200_requests_a_third_aborted(maverick: Written, exactness: Exactness) -> None:
    chance = random.Random(0)
    collected = Collected()
    config = engine_config(
        maverick.folder, max_num_batched_tokens=256, max_num_seqs=64, kv_memory_bytes=20 * BLOCK, block_size=2
    )
    rank = LocalRank(config, publish=collected.publish)
    requests = [(prompt(n, chance.choice([1, 3, 20, 36, 37, 38, 60, 120])), chance.randint(1, 30)) for n in range(200)]
    sequences = [greedy(n, ids, count, f"router {n % 3}") for n, (ids, count) in enumerate(requests)]
    aborted = [sequences[n] for n in chance.sample(range(200), 66)]
    with Running(rank):
        for number, sequence in enumerate(sequences):
            rank.inbox.put(Add(sequence))
            if number % 40 == 0:
                time.sleep(0.02)
        for sequence in aborted:
            time.sleep(chance.random() * 0.02)
            rank.inbox.put(Abort(sequence.key))
        kept = [sequence for sequence in sequences if sequence not in aborted]
        collected.wait(lambda got: all(sequence.key in got.finished for sequence in kept))
        # It parks, which checks its integrity, and holds nothing any more.
        deadline = time.monotonic() + 10
        while rank.engine.load.running or rank.engine.load.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    rank.scheduler.check_integrity()
    assert rank.runner.blocks.usage_ratio == 0
    assert rank.scheduler.pending_tokens == 0
    assert rank.scheduler.num_preemptions > 0
    assert any(sequence.key not in collected.finished for sequence in aborted), "all had finished before their abort"
    for sequence in kept:
        tokens = collected.tokens[sequence.key]
        assert len(tokens) == sequence.max_tokens
        assert collected.finished[sequence.key] == Finish.LENGTH
    begun = [sequence for sequence in aborted if sequence.key in collected.tokens]
    for sequence in chance.sample(kept, 60) + begun[:15]:
        # Of the aborted ones, what came before was right, too.
        exactness.check(maverick.reference, sequence.prompt_ids, collected.tokens[sequence.key], str(sequence.key))


@pytest.mark.parametrize("model", ["maverick", "scout"])
def test_preemption_changes_no_token(model: str, request: pytest.FixtureRequest, exactness: Exactness) -> None:
    written: Written = request.getfixturevalue(model)
    requests = [(prompt(n, 10 + 9 * n), 50) for n in range(8)]
    pressed = LocalRank(engine_config(written.folder, kv_memory_bytes=16 * BLOCK, max_num_seqs=8, block_size=4))
    outputs = pressed.generate(greedy(n, ids, count) for n, (ids, count) in enumerate(requests))
    assert pressed.scheduler.num_preemptions > 3
    ample = LocalRank(engine_config(written.folder, kv_memory_bytes=2**24))
    assert ample.generate(greedy(n, ids, count) for n, (ids, count) in enumerate(requests)) == outputs
    assert ample.scheduler.num_preemptions == 0
    for (ids, _), output in zip(requests, outputs, strict=True):
        exactness.check(written.reference, ids, output, "under pressure")


def seeded(number: int) -> Sequence:
    """Requests of every kind of sampling, the same for the same number."""
    params = SamplingParams(
        temperature=[0.7, 1.0, 1.5][number % 3],
        top_p=[1.0, 0.9][number % 2],
        top_k=[0, 0, 40, 5][number % 4],
        min_p=[0.0, 0.02][number // 2 % 2],
        repetition_penalty=[1.0, 1.2][number // 3 % 2],
        seed=1000 + number,
        sibling=number % 2,
    )
    return Sequence(("a", number), prompt(number % 5, 5 + 11 * (number % 5)), params, 16)


def test_a_seeded_request_draws_the_same_alone_in_a_batch_and_preempted(maverick: Written) -> None:
    alone = outputs_alone(maverick, [seeded(number) for number in range(12)])
    ample = LocalRank(engine_config(maverick.folder))
    assert ample.generate(seeded(number) for number in range(12)) == alone
    pressed = LocalRank(engine_config(maverick.folder, kv_memory_bytes=9 * BLOCK, block_size=4))
    assert pressed.generate(seeded(number) for number in reversed(range(12))) == alone[::-1]
    assert pressed.scheduler.num_preemptions > 0
    assert len({tuple(output) for output in alone}) == 12


def test_siblings_draw_differently(maverick: Written) -> None:
    rank = LocalRank(engine_config(maverick.folder))
    ids = prompt(1, 12)
    outputs = rank.generate(
        Sequence(("a", sibling), ids, SamplingParams(temperature=1.0, seed=5, sibling=sibling), 16)
        for sibling in range(4)
    )
    assert len({tuple(output) for output in outputs}) == 4


def test_a_replayed_stream_goes_on_as_it_would_have(maverick: Written) -> None:
    rank = LocalRank(engine_config(maverick.folder))
    for number in (0, 7):
        (whole,) = rank.generate([seeded(number)])
        for cut in (1, 9, 15):
            again = seeded(number)
            again.output_ids = whole[:cut]
            assert rank.generate([again]) == [whole]


def test_all_that_depends_on_what_is_prompt_and_what_output_is_right_after_a_replay(maverick: Written) -> None:
    collected: list[Emitted] = []
    rank = LocalRank(engine_config(maverick.folder), publish=lambda _, emitted: collected.extend(emitted))
    sampling = SamplingParams(
        temperature=1.0, top_p=0.95, seed=11, repetition_penalty=1.4, presence_penalty=0.6, frequency_penalty=0.3,
        logprobs=2, prompt_logprobs=1,
    )  # fmt: skip

    def run(output_ids: list[int], stop_token_ids: frozenset[int] = frozenset()) -> list[Emitted]:
        collected.clear()
        sequence = Sequence(
            ("a", 1), prompt(3, 21), sampling, 24, min_tokens=12, stop_token_ids=stop_token_ids, output_ids=output_ids
        )
        rank.inbox.put(Add(sequence))
        while rank.engine.step():
            pass
        return list(collected)

    def told(items: list[Emitted]) -> list[Any]:
        return [(item.sample.token_id, item.sample.logprobs.chosen[0], item.finish) for item in items]

    free = [item.sample.token_id for item in run([])]
    # Tokens that come early and late: before min_tokens they may not end it, and are not drawn.
    stops = frozenset({free[2], free[5], free[14]})
    whole = run([], stops)
    ids = [item.sample.token_id for item in whole]
    assert len(whole[0].prompt_logprobs) == 20
    assert len(ids) >= 12 and not stops & set(ids[:11])
    for cut in range(1, len(ids)):
        rest = run(ids[:cut], stops)
        assert told(rest) == told(whole[cut:])
        assert not any(item.prompt_logprobs for item in rest), "they were sent with the first token"
        values = [item.sample.logprobs.chosen[1] for item in rest]
        assert values == pytest.approx([item.sample.logprobs.chosen[1] for item in whole[cut:]], abs=1e-4)


def test_the_longest_sequence_there_may_be(maverick: Written, exactness: Exactness) -> None:
    config = engine_config(maverick.folder, kv_memory_bytes=10 * BLOCK, block_size=16, max_num_seqs=4)
    rank = LocalRank(config)
    longest = rank.runner.max_model_len
    assert longest < 4096
    ids = prompt(1, longest - 60)
    (output,) = rank.generate([greedy(0, ids, 60)])
    assert len(output) == 60
    exactness.check(maverick.reference, ids, output, f"{longest} tokens")


def test_logprobs_are_the_references(maverick: Written) -> None:
    ids = prompt(2, 50)
    sequence = Sequence(("a", 1), ids, SamplingParams(logprobs=4, temperature=0.8, seed=1, repetition_penalty=1.3), 8)
    collected: list[Emitted] = []
    rank = LocalRank(engine_config(maverick.folder), publish=lambda _, emitted: collected.extend(emitted))
    rank.inbox.put(Add(sequence))
    while rank.engine.step():
        pass
    want = torch.log_softmax(maverick.reference.logits(ids + sequence.output_ids).float(), -1)[len(ids) - 1 : -1]
    assert len(collected) == 8
    for item, want_V in zip(collected, want, strict=True):
        assert item.sample.logprobs is not None
        token, value = item.sample.logprobs.chosen
        assert token == item.sample.token_id
        assert value == pytest.approx(float(want_V[token]), abs=1e-4)
        values = [value for _, value in item.sample.logprobs.top]
        assert values == pytest.approx(want_V.topk(4).values.tolist(), abs=1e-4)


@pytest.mark.parametrize(("budget", "memory"), [(512, 2**22), (7, 2**22), (64, 10 * BLOCK)])
def test_prompt_logprobs_are_the_references(maverick: Written, budget: int, memory: int) -> None:
    prompts = [prompt(n, 1 + 45 * n) for n in range(4)]
    sequences = [Sequence(("a", n), ids, SamplingParams(prompt_logprobs=2), 40) for n, ids in enumerate(prompts)]
    got: dict[int, list[Any]] = {}

    def publish(_step: int, emitted: list[Emitted]) -> None:
        for item in emitted:
            number = item.sequence.key[1]
            assert number not in got or not item.prompt_logprobs, "prompt log-probabilities come once"
            got.setdefault(number, item.prompt_logprobs)

    config = engine_config(maverick.folder, max_num_batched_tokens=budget, max_num_seqs=4, kv_memory_bytes=memory)
    rank = LocalRank(config, publish=publish)
    for sequence in sequences:
        rank.inbox.put(Add(sequence))
    while rank.engine.step():
        pass
    assert (rank.scheduler.num_preemptions > 0) == (memory == 10 * BLOCK)
    for number, ids in enumerate(prompts):
        want = torch.log_softmax(maverick.reference.logits(ids).float(), -1)
        assert [entry.chosen[0] for entry in got[number]] == ids[1:]
        for position, entry in enumerate(got[number]):
            assert entry.chosen[1] == pytest.approx(float(want[position, ids[position + 1]]), abs=1e-4)
            assert [value for _, value in entry.top] == pytest.approx(want[position].topk(2).values.tolist(), abs=1e-4)


# ---- the loop ----------------------------------------------------------------------------------------------------


def test_an_abort_takes_effect_in_the_very_next_step(maverick: Written) -> None:
    rank = LocalRank(engine_config(maverick.folder))
    for number in (1, 2):
        rank.inbox.put(Add(greedy(number, prompt(number, 20), 50)))
    for _ in range(3):
        assert rank.engine.step()
    used = rank.runner.blocks.usage_ratio
    rank.inbox.put(Abort(("router", 1)))
    rank.inbox.put(Abort(("router", 77)))
    assert rank.engine.step()
    step, emitted = rank.emitted[-1]
    assert [item.sequence.key for item in emitted] == [("router", 2)]
    assert rank.runner.blocks.usage_ratio < used
    assert (rank.engine.load.running, rank.engine.load.waiting) == (1, 0)
    rank.inbox.put(RouterGone("router"))
    assert not rank.engine.step()
    assert rank.runner.blocks.usage_ratio == rank.engine.load.kv_usage_ratio == 0
    assert rank.emitted[-1][0] == step, "something was published for an idle step"


def test_a_router_that_goes_takes_its_own_and_no_others(maverick: Written) -> None:
    rank = LocalRank(engine_config(maverick.folder))
    for number in range(6):
        rank.inbox.put(Add(greedy(number, prompt(number, 9), 9, router="ab"[number % 2])))
    rank.engine.step()
    rank.inbox.put(RouterGone("a"))
    rank.engine.step()
    assert {item.sequence.key[0] for item in rank.emitted[-1][1]} == {"b"}
    assert rank.engine.load.running == 3


def test_steps_are_numbered_and_loads_add_up(maverick: Written) -> None:
    rank = LocalRank(engine_config(maverick.folder, max_num_batched_tokens=16, max_num_seqs=2))
    assert not rank.engine.step()
    for number in range(3):
        rank.inbox.put(Add(greedy(number, prompt(number, 20), 3)))
    assert rank.engine.step()
    load = rank.engine.load
    assert (load.running, load.waiting, load.tokens_computed) == (2, 1, 16)
    assert load.pending_tokens == 3 * 20 - 16
    assert load.kv_usage_ratio > 0
    while rank.engine.step():
        pass
    load = rank.engine.load
    assert (load.running, load.waiting, load.pending_tokens, load.kv_usage_ratio) == (0, 0, 0, 0.0)
    # The last drawn token of each is never computed.
    assert load.tokens_computed == 3 * 22
    assert load.tokens_exchanged == 0
    # Step 1 found nothing to do; every later one is numbered, whether it had tokens to publish or not.
    assert [step for step, _ in rank.emitted] == list(range(2, 2 + len(rank.emitted)))


def test_a_rank_with_work_wakes_its_peers_once(maverick: Written) -> None:
    rank = LocalRank(engine_config(maverick.folder))
    collected, woken = Collected(), []
    rank.engine = Engine(
        rank.runner, rank.scheduler, rank.exchange, rank.inbox, rank.metrics, collected.publish, woken.append
    )
    with Running(rank):
        for number in range(3):
            rank.inbox.put(Add(greedy(number, [5, 6], 4)))
            collected.wait(lambda got, n=number: ("router", n) in got.finished)
            time.sleep(0.05)
        # A peer's wake: a step, and nobody is woken for it.
        steps = list(woken)
        rank.inbox.wake(0, collected.steps[-1] + 2)
        time.sleep(0.1)
        assert woken == steps
    assert len(woken) == 3
    # The woken step is the first that works: idle agreements are steps, too.
    assert woken[1:] == [collected.steps[4], collected.steps[8]]


class BreakingExchange(LocalExchange):
    """Loses its peer at the given call of dispatch."""

    def __init__(self, at: int) -> None:
        self.left = at

    def dispatch(self, *args: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise ExchangeError("a peer is lost")
        return super().dispatch(*args)


def test_a_step_that_fails_publishes_nothing_and_moves_nothing(maverick: Written) -> None:
    exchange = BreakingExchange(at=4 * 3 + 2)  # in the second MoE layer of the fourth step
    rank = LocalRank(engine_config(maverick.folder), exchange=exchange)
    sequence = greedy(1, prompt(1, 20), 9)
    rank.inbox.put(Add(sequence))
    with pytest.raises(ExchangeError, match="a peer is lost"):
        rank.engine.run()
    assert [step for step, _ in rank.emitted] == [1, 2, 3]
    assert len(sequence.output_ids) == 3
    assert sequence.num_computed_tokens == 22
    # Survivors keep process, weights and KV: the same step, done again, goes on as if nothing had been.
    exchange.left = 0
    while rank.engine.step():
        pass
    rank.scheduler.check_integrity()
    assert sequence.output_ids == LocalRank(engine_config(maverick.folder)).generate([greedy(1, prompt(1, 20), 9)])[0]


def test_end_of_text_beyond_the_vocabulary(tmp_path: Path, exactness: Exactness) -> None:
    """The published end-of-text ids with a toy vocabulary: no token is one, and nothing breaks."""
    written = Written(tmp_path, Reference(write(tmp_path, MAVERICK)))
    edit_config(tmp_path, lambda raw: raw.update(eos_token_id=[200001, 200007]))
    rank = LocalRank(engine_config(tmp_path))
    stops = frozenset(rank.model.eos_token_ids)
    (output,) = rank.generate([greedy(1, [5, 6, 7], 6, min_tokens=3, stop_token_ids=stops)])
    exactness.check(written.reference, [5, 6, 7], output)
