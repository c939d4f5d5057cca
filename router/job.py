"""A stream on its way to a rank, and to the next one when that is lost."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from router.loss import Loss
from router.rank_link import RankLink
from router.stream import Stream


@dataclass(eq=False)
class Job:
    """What the dispatcher knows of a stream.

    Attributes:
        on_start: called when it goes to a rank for the first time.
        link: the rank it is at; None while it waits for one.
        number: its place in the order in which streams started; None: it has not started.
        loss: why it left its last rank; None: it never did, or a token has come since.
        losses: ranks lost since its last token.
        refusals: times since its last token that a rank which is well did not go on with it.
        lost_at: when it lost the first of them, by time.monotonic.
        waited_s: seconds since its last token in which no rank could take it.
        waiting_since: since when it waits for another rank, by time.monotonic.
        bound: ends that wait.
    """

    stream: Stream
    on_start: Callable[[], None]
    link: RankLink | None = None
    number: int | None = None
    loss: Loss | None = None
    losses: int = 0
    refusals: int = 0
    lost_at: float = 0.0
    waited_s: float = 0.0
    waiting_since: float = 0.0
    bound: asyncio.TimerHandle | None = None

    def progress(self) -> float | None:
        """A token has come: what was lost before is forgotten.

        Returns:
            Seconds since the stream lost its rank; None where it had not.
        """
        if self.loss is None:
            return None
        self.loss, self.losses, self.refusals, self.waited_s = None, 0, 0, 0.0
        return time.monotonic() - self.lost_at
