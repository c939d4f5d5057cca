"""A rank is killed under streams, and their clients see nothing but a gap."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from protos.client import NO_RETRIES, Client, Completion, add_response, make_request
from tests.e2e.serving import Server

PROMPTS = ("Once upon a time", "The whale", "In the morning she", "There was a")
NUM_STREAMS, NUM_TOKENS = 8, 200


@pytest.fixture(scope="module")
def two_ranks(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), "--model", str(checkpoint), "--ranks", "2", "--dtype", "float32")
    try:
        server.wait_ready()
        yield server
        assert server.end() < 10
        assert server.left == []
    finally:
        server.kill_all()


class Talk:
    """One stream, read to its end by a client that never tries again."""

    def __init__(self, address: str, number: int) -> None:
        sampled = {"temperature": 0.9, "top_p": 0.95, "frequency_penalty": 0.3, "seed": number}
        self.request = make_request(
            f"{PROMPTS[number % len(PROMPTS)]} {number}", max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2,
            repetition_penalty=1.1, **(sampled if number % 2 else {"temperature": 0.0}),
        )  # fmt: skip
        self.address = address
        self.done = Completion()
        self.times: list[float] = []

    def run(self) -> Completion:
        with Client(self.address, retries=NO_RETRIES) as client:
            for response in client.generate(self.request, timeout_s=90):
                add_response(self.done, response)
                self.times.append(time.monotonic())
        return self.done


def talk(server: Server, meanwhile: threading.Event | None = None) -> list[Talk]:
    """All streams at once; sets `meanwhile` when each has begun."""
    talks = [Talk(server.address, number) for number in range(NUM_STREAMS)]
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        runs = [pool.submit(each.run) for each in talks]
        while meanwhile is not None and not meanwhile.is_set():
            if all(len(each.done.token_ids) > 20 for each in talks) or any(run.done() for run in runs):
                meanwhile.set()
            time.sleep(0.005)
        for run in runs:
            run.result()
    return talks


@pytest.mark.timeout(240)
def test_a_killed_rank_s_streams_go_on(two_ranks: Server) -> None:
    undisturbed = talk(two_ranks)
    (gang,) = two_ranks.status()["gangs"]
    pid, epoch = gang["ranks"][1]["pid"], gang["epoch"]
    has_begun, killed = threading.Event(), threading.Event()

    def kill() -> None:
        has_begun.wait(60)
        psutil.Process(pid).kill()
        killed.set()

    killer = threading.Thread(target=kill)
    killer.start()
    disturbed = talk(two_ranks, has_begun)
    killer.join()
    assert killed.is_set()
    for one, other in zip(disturbed, undisturbed, strict=True):
        assert one.done.token_ids == other.done.token_ids, f"stream {one.request.text!r}"
        assert len(one.done.token_ids) == NUM_TOKENS
        assert (one.done.text, one.done.finish_reason) == (other.done.text, other.done.finish_reason)
        assert [p.chosen.token_id for p in one.done.logprobs] == one.done.token_ids
        for mine, theirs in zip(one.done.logprobs, other.done.logprobs, strict=True):
            assert mine.chosen.logprob == pytest.approx(theirs.chosen.logprob, abs=1e-3)
        assert one.done.usage.completion_tokens == NUM_TOKENS
        assert one.done.usage.prompt_tokens == other.done.usage.prompt_tokens
    (gang,) = two_ranks.status()["gangs"]
    assert gang["epoch"] > epoch
    gaps = [max(b - a for a, b in zip(each.times, each.times[1:], strict=False)) for each in disturbed]
    print(f"worst gap of each stream: {', '.join(f'{gap:.2f}' for gap in gaps)} s")
