"""Streams for a server under chaos: what is asked, and clients that read it."""

import itertools
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protos import inference_pb2
from protos.client import Client, Retries, finish_reason_name, make_request
from protos.errors import CaravanError

OPENINGS = (
    "Call me Ishmael. Some years ago, never mind how long precisely",
    "In the beginning God created the heaven and the earth",
    "It is a truth universally acknowledged, that a single man",
    "Fellow-Citizens of the Senate and of the House of Representatives",
    "The whale rose out of the sea, and all hands were at the boats",
    "And the king said unto them, What is this that ye have done",
    "My dear Watson, you see but you do not observe",
    "Once upon a time there was a little house at the edge of a wood",
)
NUM_REQUESTS = 32
TOKENS = (150, 300)
"""Least and most of an output."""
STREAM_BOUND_S = 180.0
# An outage may last as long as a gang takes to start.
PATIENCE = Retries(attempts=100, longest_pause_s=1.0)


@dataclass(frozen=True)
class Asked:
    """One of the requests that are sent again and again."""

    number: int

    @property
    def max_tokens(self) -> int:
        least, most = TOKENS
        return least + self.number * 61 % (most - least + 1)

    def request(self, request_id: str) -> inference_pb2.GenerateRequest:
        """The even ones are greedy, the odd ones sampled; every fourth of those with penalties."""
        number = self.number
        rotated = (*OPENINGS[number % 8 :], *OPENINGS[: number % 8])
        prompt = f"{number}. " + ". ".join(rotated[: 1 + number // 8])
        drawn: dict[str, float | int] = {"temperature": 0.0}
        if number % 2:
            drawn = {"temperature": 0.8, "top_p": 0.95, "seed": 1000 + number}
        if number % 8 == 1:
            drawn |= {"frequency_penalty": 0.3, "repetition_penalty": 1.1}
        return make_request(
            prompt, request_id=request_id, max_tokens=self.max_tokens, ignore_eos=True, resumable=True, **drawn
        )


@dataclass
class Told:
    """One stream, as its client saw it; times by time.monotonic."""

    asked: Asked
    request_id: str
    sent_at: float = field(default_factory=time.monotonic)
    times: list[float] = field(default_factory=list)
    """Of messages with tokens."""
    counts: list[int] = field(default_factory=list)
    """Tokens of each."""
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    ended_at: float = 0.0
    failure: str = ""
    """Why it did not come to its end."""

    def read(self, address: str) -> None:
        """To the end, by a connection of its own."""
        reason = inference_pb2.FINISH_REASON_UNSPECIFIED
        try:
            with Client(address, connect_timeout_s=30.0, retries=PATIENCE) as client:
                for response in client.generate(self.asked.request(self.request_id), timeout_s=STREAM_BOUND_S):
                    reason = response.finish_reason or reason
                    self.text += response.text
                    if response.token_ids:
                        self.times.append(time.monotonic())
                        self.counts.append(len(response.token_ids))
                        self.token_ids += response.token_ids
        except CaravanError as error:
            self.failure = f"{error.code.name}: {error.message}"
            return
        if reason != inference_pb2.FINISH_REASON_LENGTH:
            self.failure = f"it ended with {finish_reason_name(reason) or 'no reason'}"

    def difference(self, reference: "Told") -> str:
        """The first one; empty where there is none."""
        pairs = enumerate(itertools.zip_longest(self.token_ids, reference.token_ids))
        for position, (mine, other) in pairs:
            if mine != other:
                near = slice(max(0, position - 3), position + 4)
                return (
                    f"request {self.asked.number} ({self.request_id}): token {position} of {len(self.token_ids)} is "
                    f"{mine}, undisturbed it is {other} of {len(reference.token_ids)}; around it "
                    f"{self.token_ids[near]} for {reference.token_ids[near]}"
                )
        if self.text != reference.text:
            return f"request {self.asked.number} ({self.request_id}): the same tokens, another text"
        return ""

    def gaps(self) -> list[tuple[float, float]]:
        """Between messages: from, to."""
        return list(itertools.pairwise(self.times))


class Load:
    """So many streams at a time, each followed by the next, from `start` until `stop` and its last stream's end."""

    def __init__(self, address: str, at_a_time: int, requests: Sequence[Asked]) -> None:
        self._address = address
        self._requests = requests
        self._name = uuid.uuid4().hex[:6]
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._most = 0
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(at_a_time)]
        self.told: list[Told] = []
        """In the order in which they were sent."""
        self.done = 0

    def start(self, most: int = 0) -> None:
        """Send `most` in all; 0: until stopped."""
        self._most = most
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No further ones; those under way go on."""
        self._stopped.set()

    def wait(self, on_wait: Callable[[], None] = lambda: None) -> list[Told]:
        """Until the last one's end."""
        for thread in self._threads:
            while thread.is_alive():
                thread.join(0.2)
                on_wait()
        return self.told

    def _run(self) -> None:
        while not self._stopped.is_set():
            with self._lock:
                number = next(self._numbers)
                if self._most and number >= self._most:
                    return
                asked = self._requests[number % len(self._requests)]
                told = Told(asked, f"chaos-{self._name}-{number}")
                self.told.append(told)
            told.read(self._address)
            told.ended_at = time.monotonic()
            with self._lock:
                self.done += 1


def list_of_requests(count: int = NUM_REQUESTS) -> list[Asked]:
    """The first so many."""
    return [Asked(number) for number in range(count)]
