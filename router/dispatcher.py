"""From the queue to the ranks: a request goes out when it is its turn and a rank has room."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from router.admission import Admission, AdmissionLimits
from router.call import CallInfo
from router.config import RouterConfig
from router.errors import NotReady
from router.fair_queue import Ticket
from router.gangs import Gangs
from router.metrics import RouterMetrics
from router.rank_link import RankLink
from router.stream import Stream


@dataclass(eq=False)
class Job:
    """A stream on its way to a rank.

    Attributes:
        link: the rank it went to; None while it waits.
    """

    stream: Stream
    on_start: Callable[[], None]
    link: RankLink | None = None


class Dispatcher:
    """Admits, queues and places streams. Nothing here waits: it acts when something changes.

    Args:
        gangs: where streams can go.
    """

    def __init__(self, gangs: Gangs, config: RouterConfig, metrics: RouterMetrics) -> None:
        self._gangs = gangs
        self._queued_tokens = metrics.queued_tokens
        limits = AdmissionLimits(config.max_queued_tokens, config.tokens_per_minute, config.tenant_tokens_per_minute)
        self._admission = Admission[Job](limits, time.monotonic)
        self._is_placing = False
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
            has_room=self._gangs.has_room(len(request.prompt_ids)),
            within_s=within_s,
            key=(request.tenant, request.request_id, request.sibling) if request.has_id else None,
            is_retry=call.attempt > 0,
        )
        self._place()
        return ticket

    def served(self, tokens: int) -> None:
        """Tokens were computed or drawn."""
        self._admission.served(tokens)

    def end(self, ticket: Ticket[Job], used: int, is_complete: bool) -> None:
        """A stream has ended: takes it out of the queue, or ends what its rank still does for it.

        Args:
            used: tokens it took.
            is_complete: it came to its own end.
        """
        job = ticket.item
        if job.link is None:
            self._admission.withdraw(ticket)
            self._queued_tokens.set(self._admission.queue.total)
        else:
            if not job.stream.is_rank_done:
                job.link.abort(job.stream.sequence_id)
            self._admission.finish(ticket, used, is_complete)
        self._place()

    def cancel_elsewhere(self, tenant: str, request_id: str, sibling: int | None = None) -> None:
        """Ends what other routers' clients have of a request; `sibling`: only this output of it."""
        self._gangs.cancel(tenant, request_id, sibling)

    def close(self) -> None:
        """Ends every stream that waits."""
        for waiting in list(self._admission.queue):
            waiting.item.stream.refuse(NotReady("the router shuts down; send the request again"))

    def _place(self) -> None:
        queue = self._admission.queue
        if self._is_placing or not queue.total:
            return
        # What ends or starts below calls back here.
        self._is_placing = True
        try:
            if not self._gangs.is_ready:
                reason = NotReady(f"no gang is ready any more ({self._gangs.why_not_ready()}); send the request again")
                for waiting in list(queue):
                    waiting.item.stream.refuse(reason)
            while (ticket := queue.peek()) is not None:
                job = ticket.item
                job.link = self._gangs.submit(job.stream)
                if job.link is None:
                    break
                self._admission.start(ticket)
                job.on_start()
        finally:
            self._is_placing = False
        self._queued_tokens.set(queue.total)
