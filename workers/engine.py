"""The step loop of one rank: take what came, plan, agree, execute, commit, publish."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from workers.exchange import Exchange
from workers.inbox import Abort, Add, Cancel, Inbox
from workers.metrics import RankMetrics
from workers.runner import Runner
from workers.scheduler import Emitted, Scheduler, step_work

# An idle rank checks its books at most so often: a large pool takes tens of milliseconds.
INTEGRITY_SECONDS = 10.0


@dataclass(frozen=True)
class Load:
    """A rank's load after a step, and its totals since the start."""

    running: int = 0
    waiting: int = 0
    pending_tokens: int = 0
    kv_usage_ratio: float = 0.0
    tokens_computed: int = 0
    tokens_exchanged: int = 0
    max_num_seqs: int = 0
    """Sequences it runs at once at most."""
    kv_capacity_tokens: int = 0
    """Tokens the pool of blocks of its global layers holds."""
    bytes_within_host: int = 0
    """Sent to ranks of the same host."""
    bytes_between_hosts: int = 0


class Engine:
    """Runs in one thread; everything reaches it through its inbox.

    All ranks of the epoch step together: a step opens with an agreement on who has how many tokens. After one in which
    nobody has any they park, and the first to get work wakes the others for the step it opens.

    Args:
        publish: takes the step's number and new tokens; must not block.
        wake_peers: tells every other rank that this one opens a step; must not block.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        exchange: Exchange,
        inbox: Inbox,
        metrics: RankMetrics,
        publish: Callable[[int, list[Emitted]], None],
        wake_peers: Callable[[int], None],
    ) -> None:
        self._runner, self._scheduler, self._exchange = runner, scheduler, exchange
        self._inbox, self._metrics = inbox, metrics
        self._publish, self._wake_peers = publish, wake_peers
        self._next_step = 1
        # Sent in epochs that are over.
        self._rows_sent = self._within_host = self._between_hosts = 0
        self._checked_at = -INTEGRITY_SECONDS
        self._tokens_computed = 0
        self.load = self._load()
        """Replaced after every step, never changed: other threads may read it."""

    def enter(self, epoch: int, exchange: Exchange) -> None:
        """Go on in another epoch, whose steps are counted from 1; between two calls of `run`.

        A step that was abandoned is planned again: nothing of it was committed. The blocks it was given stay with their
        sequences, which need them as soon.
        """
        before = self._exchange
        self._rows_sent += before.rows_sent
        self._within_host += before.bytes_within_host
        self._between_hosts += before.bytes_between_hosts
        self._exchange, self._next_step = exchange, 1
        self._inbox.enter(epoch)
        self._update_load()

    def run(self) -> None:
        """Step until the inbox is stopped or interrupted.

        Raises:
            ExchangeError: a peer is lost; nothing of the step under way was published.
        """
        while not self._inbox.interrupted:
            if not self.step():
                self._park()

    def step(self) -> bool:
        """One step of all ranks. False if none had anything to do."""
        clock = self._runner.clock
        clock.start()
        if ended := self._take_messages() + self._scheduler.expire(time.monotonic()):
            # Whatever becomes of the step, these are over.
            self._update_load()
            self._publish(self._next_step, ended)
        plan = self._scheduler.plan()
        work = step_work(plan)
        clock.lap("schedule")
        agreed = self._exchange.agree(work)
        clock.lap("agree")
        number, self._next_step = self._next_step, self._next_step + 1
        if not any(each.tokens for each in agreed):
            self._scheduler.observe(agreed, self._exchange.index, 0.0)
            self._update_load()
            return False
        samples = self._runner.execute(plan)
        emitted = self._scheduler.commit(plan, samples)
        self._tokens_computed += work.tokens
        self._update_load()
        clock.lap("schedule")
        self._publish(number, emitted)
        clock.lap("publish")
        seconds = clock.finish()
        self._scheduler.observe(agreed, self._exchange.index, seconds)
        self._metrics.observe_step(seconds, work.tokens, self._scheduler)
        return True

    def _take_messages(self) -> list[Emitted]:
        """Returns what a message ended that its own router must be told of."""
        ended: list[Emitted] = []
        for message in self._inbox.drain():
            match message:
                case Add(sequence):
                    self._scheduler.add(sequence)
                case Abort(key):
                    self._scheduler.abort(key)
                case Cancel(router, tenant, request_id, sibling):
                    ended += self._scheduler.cancel(router, tenant, request_id, sibling)
                case _:
                    self._scheduler.abort_router(message.router)
        return ended

    def _park(self) -> None:
        if time.monotonic() - self._checked_at > INTEGRITY_SECONDS:
            self._checked_at = time.monotonic()
            self._scheduler.check_integrity()
        self._metrics.flush()
        if self._inbox.park(self._next_step):
            self._wake_peers(self._next_step)

    def _update_load(self) -> None:
        self.load = self._load()

    def _load(self) -> Load:
        return Load(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            pending_tokens=self._scheduler.pending_tokens,
            kv_usage_ratio=self._scheduler.kv_usage_ratio,
            tokens_computed=self._tokens_computed,
            tokens_exchanged=self._rows_sent + self._exchange.rows_sent,
            max_num_seqs=self._scheduler.max_num_seqs,
            kv_capacity_tokens=self._scheduler.kv_capacity_tokens,
            bytes_within_host=self._within_host + self._exchange.bytes_within_host,
            bytes_between_hosts=self._between_hosts + self._exchange.bytes_between_hosts,
        )
