"""From the queue to the ranks: a request goes out when it is its turn and a rank has room."""

import asyncio
import itertools
import time
from collections.abc import Callable

from router.admission import Admission, AdmissionLimits
from router.call import CallInfo
from router.config import RouterConfig
from router.errors import NotReady
from router.fair_queue import Ticket
from router.gangs import Gangs
from router.job import Job
from router.loss import Loss, LossReason
from router.metrics import RouterMetrics
from router.replay import Replays
from router.stream import Stream


class Dispatcher:
    """Admits, queues and places streams. Nothing here waits: it acts when something changes.

    Streams that lost their rank go first; they stay what they are to the admission: started, and charged once.

    Args:
        gangs: where streams can go.
    """

    def __init__(self, gangs: Gangs, config: RouterConfig, metrics: RouterMetrics) -> None:
        self._gangs = gangs
        self._queued_tokens = metrics.queued_tokens
        limits = AdmissionLimits(config.max_queued_tokens, config.tokens_per_minute, config.tenant_tokens_per_minute)
        self._admission = Admission[Job](limits, time.monotonic)
        self._replays = Replays(gangs, config, metrics)
        self._wait_s = config.replay_wait_s
        self._starts = itertools.count(1)
        # Ends the wait of those in the queue while no gang is ready.
        self._bound: asyncio.TimerHandle | None = None
        self._is_placing = False
        self._is_closed = False
        gangs.on_change = self._place

    def submit(
        self, stream: Stream, within_s: float | None, call: CallInfo, on_start: Callable[[], None]
    ) -> Ticket[Job]:
        """Sends a stream to a rank, or queues it until one has room.

        Args:
            within_s: seconds until the stream's deadline; None: it has none.
            call: the call it came with.
            on_start: called when it goes to a rank.

        Raises:
            NotReady: no gang can take it.
            Overloaded: it may not wait, or would wait too long.
        """
        self._gangs.ready_views()
        request = stream.request
        ticket = Ticket(Job(stream, on_start), request.tenant, request.priority, request.cost)
        self._admission.offer(
            ticket,
            has_room=self._gangs.has_room(stream),
            within_s=within_s,
            key=(request.tenant, request.request_id, request.sibling) if request.has_id else None,
            is_retry=call.attempt > 0,
        )
        self._place()
        return ticket

    def served(self, tokens: int) -> None:
        """Tokens were computed or drawn."""
        self._admission.served(tokens)

    def lost(self, ticket: Ticket[Job], loss: Loss) -> None:
        """A stream lost its rank. It goes to another when the gangs have told of the change, or is failed."""
        self._replays.add(ticket.item, Loss(LossReason.SHUTDOWN, loss.detail) if self._is_closed else loss)
        self._admission.set_away(len(self._replays))

    def end(self, ticket: Ticket[Job], used: int, is_complete: bool) -> None:
        """A stream has ended: takes it out of the queue, or ends what its rank still does for it.

        Args:
            used: tokens it took.
            is_complete: it came to its own end.
        """
        job = ticket.item
        if job.number is None:
            self._admission.withdraw(ticket)
        else:
            if job.link is None:
                self._replays.discard(job)
            elif not job.stream.is_rank_done:
                job.link.abort(job.stream.sequence_id)
            self._admission.finish(ticket, used, is_complete)
        self._place()
        self._note()

    def cancel_elsewhere(self, tenant: str, request_id: str, sibling: int | None = None) -> None:
        """Ends what other routers' clients have of a request; `sibling`: only this output of it."""
        self._gangs.cancel(tenant, request_id, sibling)

    def close(self) -> None:
        """Ends every stream that waits; those at ranks end when they are lost."""
        self._is_closed = True
        reason = NotReady("the router shuts down; send the request again")
        self._refuse_queue(reason)
        self._replays.refuse_all(reason)
        self._note()

    def _place(self) -> None:
        queue = self._admission.queue
        if self._is_placing or not (queue.total or self._replays):
            return
        # What ends or starts below calls back here.
        self._is_placing = True
        try:
            if not self._gangs.is_ready and (why := self._gangs.why_failed()):
                self._refuse_queue(NotReady(f"no gang is ready any more ({why}); send the request again"))
            may_start = self._replays.place()
            while may_start and (ticket := queue.peek()) is not None:
                job = ticket.item
                job.link = self._gangs.submit(job.stream)
                if job.link is None:
                    break
                job.number = next(self._starts)
                self._admission.start(ticket)
                job.on_start()
        finally:
            self._is_placing = False
        self._note()

    def _note(self) -> None:
        """What waits has changed."""
        self._queued_tokens.set(self._admission.queue.total)
        self._admission.set_away(len(self._replays))
        is_outage = bool(self._admission.queue.total) and not self._gangs.is_ready and not self._is_closed
        if is_outage and self._bound is None:
            self._bound = asyncio.get_running_loop().call_later(self._wait_s, self._end_outage)
        elif not is_outage and self._bound is not None:
            self._bound.cancel()
            self._bound = None

    def _end_outage(self) -> None:
        self._bound = None
        why = f"no gang has become ready again in {self._wait_s:g} s ({self._gangs.why_not_ready()})"
        self._refuse_queue(NotReady(f"{why}; send the request again"))

    def _refuse_queue(self, reason: NotReady) -> None:
        for waiting in list(self._admission.queue):
            waiting.item.stream.refuse(reason)
