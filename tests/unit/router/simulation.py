"""Ranks, clients and a clock that are all made up, around the real admission."""

import heapq
import itertools
import random
from dataclasses import dataclass, field

from router.admission import Admission, AdmissionLimits
from router.errors import Overloaded
from router.fair_queue import Ticket

STEP_S = 0.05


@dataclass
class Request:
    tenant: str
    prompt: int
    output: int
    max_tokens: int
    key: object
    priority: int = 0
    tries: int = 0
    done: int = 0
    arrived: float = 0.0
    started: float | None = None


@dataclass
class Simulation:
    """`slots` sequences run at once and each gets `tokens_per_step` tokens a step of 50 ms."""

    limits: AdmissionLimits
    slots: int = 16
    tokens_per_step: int = 5
    seed: int = 0
    named: str = "always the same"
    now: float = 0.0
    tokens: dict[str, int] = field(default_factory=dict)
    admitted: int = 0
    refused: int = 0
    retries: int = 0
    retries_admitted: int = 0
    delays: list[float] = field(default_factory=list)
    idle_steps: int = 0
    finished: list[Request] = field(default_factory=list)
    max_queued: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.admission = Admission[Request](self.limits, lambda: self.now)
        self.running: list[Ticket[Request]] = []
        self.due: list[tuple[float, int, Request]] = []
        self.count = itertools.count()

    @property
    def tokens_per_s(self) -> float:
        """Of output, at most."""
        return self.slots * self.tokens_per_step / STEP_S

    def request(self, tenant: str = "", **more) -> Request:
        number = next(self.count)
        return Request(
            tenant, prompt=50, output=self.random.randint(20, 100), max_tokens=100, key=("id", number), **more
        )

    def send(self, request: Request, obeys: bool = True) -> bool:
        cost = request.prompt + request.max_tokens
        ticket = Ticket(request, request.tenant, request.priority, cost)
        request.arrived = self.now
        request.tries += 1
        is_retry = request.tries > 1
        self.retries += is_retry
        try:
            self.admission.offer(
                ticket,
                has_room=len(self.running) < self.slots,
                key={"always the same": request.key, "never the same": next(self.count)}.get(self.named),
                is_retry=is_retry,
            )
        except Overloaded as error:
            self.refused += 1
            self.delays.append(error.retry_after_s)
            if obeys:
                back = self.now + error.retry_after_s * self.random.uniform(1, 1.1)
                heapq.heappush(self.due, (back, next(self.count), request))
            return False
        self.admitted += 1
        self.retries_admitted += is_retry
        self.max_queued = max(self.max_queued, self.admission.queue.total)
        self.place()
        return True

    def place(self) -> None:
        while len(self.running) < self.slots and (ticket := self.admission.queue.peek()) is not None:
            self.admission.start(ticket)
            ticket.item.started = self.now
            self.running.append(ticket)

    def step(self) -> list[Request]:
        """50 ms; returns who finished."""
        self.now += STEP_S
        self.idle_steps += not self.running
        ended = []
        for ticket in self.running:
            request = ticket.item
            new = min(self.tokens_per_step, request.output - request.done)
            counted = new + (request.prompt if not request.done else 0)
            request.done += new
            self.tokens[request.tenant] = self.tokens.get(request.tenant, 0) + counted
            self.admission.served(counted)
            if request.done >= request.output:
                ended.append(ticket)
        for ticket in ended:
            self.running.remove(ticket)
            self.admission.finish(ticket, ticket.item.prompt + ticket.item.done, True)
        self.finished += [ticket.item for ticket in ended]
        self.place()
        while self.due and self.due[0][0] <= self.now:
            self.send(heapq.heappop(self.due)[2])
        return [ticket.item for ticket in ended]
