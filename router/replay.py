"""Streams whose rank was lost: they wait here for another, and go before anything that has not started."""

import asyncio
import time
from bisect import insort

from protos.errors import CaravanError, Outcome
from router.config import RouterConfig
from router.gangs import Gangs
from router.job import Job
from router.loss import Loss, LossReason
from router.metrics import RouterMetrics

HARMLESS = (LossReason.REFUSED, LossReason.GIVEN_UP)
"""Ends of a stream at a rank that is well."""
MANY_REFUSALS = 20


class Replays:
    """Who waits for another rank, in the order in which they started. Must be used in a running event loop.

    A stream only goes where the same weights are computed in the same type: there its tokens are what they would have
    been. It is submitted under a new number, so that nothing its old rank may still send can be taken for it.

    Args:
        gangs: where streams can go.
        config: how long a stream waits and how many ranks it may lose.
    """

    def __init__(self, gangs: Gangs, config: RouterConfig, metrics: RouterMetrics) -> None:
        self._gangs = gangs
        self._wait_s = config.replay_wait_s
        self._max_replays = config.max_replays
        self._replayed = metrics.replayed
        # By type of computation; nothing empty is kept.
        self._lines: dict[str, list[Job]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def add(self, job: Job, loss: Loss) -> None:
        """Takes a stream that lost its rank. Nothing is sent before `place`, but the stream may be failed here."""
        stream, now = job.stream, time.monotonic()
        job.link = None
        if job.loss is None:
            job.lost_at = now
        job.loss = loss
        if loss.reason in HARMLESS:
            job.refusals += 1
        else:
            job.losses += 1
        if loss.reason == LossReason.SHUTDOWN or job.losses > self._max_replays == 0:
            stream.fail(f"{loss.detail}; send the request again")
            return
        if job.losses > self._max_replays:
            sentence = (
                f"the stream lost {job.losses} ranks in a row without a token in between, the last one because "
                f"{loss.detail}; it is not tried again, as it may be what they fail of"
            )
            stream.refuse(CaravanError(Outcome.FAULT, sentence))
            return
        if job.refusals > MANY_REFUSALS and now - job.lost_at > self._wait_s:
            self._give_up(job, loss)
            return
        if why := self._gangs.why_failed(stream.dtype):
            stream.fail(why)
            return
        stream.renumber(self._gangs.next_sequence_id())
        job.waiting_since = now
        job.bound = self._call_later(self._wait_s - job.waited_s, job)
        insort(self._lines.setdefault(stream.dtype, []), job, key=lambda waiting: waiting.number or 0)

    def discard(self, job: Job) -> None:
        """The stream ended."""
        line = self._lines.get(job.stream.dtype, [])
        if job in line:
            self._remove(line, job)

    def place(self) -> bool:
        """Sends every stream on for which there is room now.

        Returns:
            False where newcomers must wait: they would take the room that one of these waits for.
        """
        may_follow = True
        for dtype, line in list(self._lines.items()):
            if why := self._gangs.why_failed(dtype):
                for job in list(line):
                    job.stream.fail(why)
                continue
            while line and (link := self._gangs.submit(line[0].stream)) is not None:
                job = line[0]
                job.link = link
                self._remove(line, job)
                job.waited_s += time.monotonic() - job.waiting_since
                if job.loss is not None:
                    self._replayed.labels(job.loss.reason).inc()
            may_follow = may_follow and not (line and self._gangs.can_take(line[0].stream))
        return may_follow

    def refuse_all(self, error: CaravanError) -> None:
        """Ends every stream here."""
        for line in list(self._lines.values()):
            for job in list(line):
                job.stream.refuse(error)

    def _expire(self, job: Job) -> None:
        loss = job.loss
        assert loss is not None
        if self._gangs.can_take(job.stream):
            # It waits for its turn alone, as anybody does.
            job.waited_s, job.waiting_since = 0.0, time.monotonic()
            job.bound = self._call_later(self._wait_s, job)
            return
        self._give_up(job, loss)

    def _give_up(self, job: Job, loss: Loss) -> None:
        why = self._gangs.why_not(job.stream)
        job.stream.fail(
            f"{loss.detail}, and within {self._wait_s:g} s no other rank could go on with the stream ({why}); "
            "send the request again"
        )

    def _call_later(self, seconds: float, job: Job) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(max(0.0, seconds), self._expire, job)

    def _remove(self, line: list[Job], job: Job) -> None:
        line.remove(job)
        if not line:
            del self._lines[job.stream.dtype]
        if job.bound is not None:
            job.bound.cancel()
            job.bound = None
