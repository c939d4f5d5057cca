"""All gangs a router can reach: what their leaders say, and a link to each of their ranks."""

import asyncio
import itertools
import logging
import uuid
from collections.abc import Callable, Sequence

from protos import gang_pb2
from router.config import RouterConfig
from router.errors import NotReady
from router.gang_view import GangWatcher, LeaderResolver
from router.loss import Loss, LossReason
from router.metrics import RouterMetrics
from router.policy import pick
from router.rank_link import RankLink
from router.stream import Stream

logger = logging.getLogger(__name__)

LinkKey = tuple[str, int, int, str]

READY, DEAD, FAILED = "ready", "dead", "failed"


class Gang:
    """One gang: the newest view of it, and links to its ranks. Must be made in a running event loop.

    Attributes:
        view: what the leader said last; None until it is reached.
        links: one to every rank that takes part in the epoch, by gang, rank, incarnation and address.
        dtype: what it computes in; empty until it was ready.
    """

    def __init__(
        self,
        router_id: str,
        resolve: LeaderResolver,
        config: RouterConfig,
        metrics: RouterMetrics,
        on_change: Callable[[], None],
    ) -> None:
        self.view: gang_pb2.GangView | None = None
        self.links: dict[LinkKey, RankLink] = {}
        self.dtype = ""
        self._router_id = router_id
        self._config = config
        self._metrics = metrics
        self._on_change = on_change
        self._runs: dict[LinkKey, asyncio.Task[None]] = {}
        self._watcher = GangWatcher(router_id, resolve, self.take_view, config.watch_silence_s, config.reconnect_max_s)
        self._watch = asyncio.create_task(self._watcher.run(), name="gang-watch")

    @property
    def is_ready(self) -> bool:
        """The leader said so last, and a rank can be reached."""
        return (
            self.view is not None
            and self.view.state == READY
            and any(link.is_connected and link.is_current for link in self.links.values())
        )

    @property
    def has_failed(self) -> bool:
        """For good: no view will be a better one."""
        return self.view is not None and self.view.state == FAILED

    def suits(self, stream: Stream) -> bool:
        """What the stream has so far could have been computed here, and the rest fits."""
        fits = self.view is not None and stream.request.cost <= self.view.max_model_len
        return fits and stream.dtype in ("", self.dtype)

    @property
    def is_watched(self) -> bool:
        """The task that follows the leader lives; it never ends by itself."""
        return not self._watch.done()

    def why_not_ready(self) -> str:
        """One clause for a person."""
        if self.view is None:
            return f"a gang is unknown: {self._watcher.problem}"
        if self.view.state != READY:
            detail = f": {self.view.detail}" if self.view.detail else ""
            return f"{self.view.gang_id} is {self.view.state}{detail}"
        return f"no rank of {self.view.gang_id} can be reached"

    def take_view(self, view: gang_pb2.GangView) -> None:
        """Makes links to new ranks, and closes those to ranks that died or were replaced."""
        if self.view is not None and self.view.gang_id == view.gang_id and view.epoch < self.view.epoch:
            self._metrics.fenced.inc()
            logger.warning("dropped a view of %s in epoch %d: it is in %d", view.gang_id, view.epoch, self.view.epoch)
            return
        self.view = view
        self.dtype = view.dtype or self.dtype
        members = {
            (view.gang_id, member.rank, member.incarnation, member.address): member
            for member in view.ranks
            if member.state != DEAD and member.address
        }
        for key, link in self.links.items():  # Nothing below is placed where it would be lost again.
            link.is_current = key in members and members[key].state == READY
        if view.state == FAILED:
            self._close(list(self.links), lambda link: f"{link.gang_id} failed: {view.detail}")
        else:
            self._close([key for key in self.links if key not in members], lambda link: f"{link} died")
            self._meet(members, view)
        self._on_change()

    def _meet(self, members: dict[LinkKey, gang_pb2.RankView], view: gang_pb2.GangView) -> None:
        for key, member in members.items():
            if link := self.links.get(key):
                link.update(view.epoch, member.load)
            elif member.state == READY and view.state == READY:
                link = RankLink(
                    self._router_id,
                    view.gang_id,
                    member,
                    view.epoch,
                    self._config.reconnect_max_s,
                    self._metrics.fenced.inc,
                    self._on_change,
                )
                self.links[key] = link
                self._runs[key] = asyncio.create_task(link.run(), name=f"link to {link}")

    def _close(self, keys: list[LinkKey], why: Callable[[RankLink], str], reason: LossReason = LossReason.DEAD) -> None:
        for key in keys:
            self._runs.pop(key).cancel()
        # All are gone before the first stream looks for another rank.
        for link in [self.links.pop(key) for key in keys]:
            link.lose_streams(Loss(reason, why(link)))

    async def close(self) -> None:
        """Ends every task and stream."""
        tasks = [self._watch, *self._runs.values()]
        self._close(list(self.links), lambda _: "the router shuts down", LossReason.SHUTDOWN)
        self._watch.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Gangs:
    """Where a request can go. Must be made in a running event loop.

    Args:
        leaders: finds each gang's leader.
        config: the router's bounds.
        metrics: the router's metrics.

    Attributes:
        on_change: called whenever a rank may have room that it had not before, or none is left.
    """

    def __init__(self, leaders: Sequence[LeaderResolver], config: RouterConfig, metrics: RouterMetrics) -> None:
        self.router_id = f"router-{uuid.uuid4().hex}"
        self.on_change: Callable[[], None] = lambda: None
        self._gangs = [Gang(self.router_id, resolve, config, metrics, self._changed) for resolve in leaders]
        self._sequence_ids = itertools.count(1)

    @property
    def views(self) -> list[gang_pb2.GangView]:
        """The newest view of every gang whose leader was ever reached."""
        return [gang.view for gang in self._gangs if gang.view is not None]

    @property
    def is_watching(self) -> bool:
        """Every gang's leader is being followed."""
        return all(gang.is_watched for gang in self._gangs)

    @property
    def is_ready(self) -> bool:
        """Some gang can take a request."""
        return any(gang.is_ready for gang in self._gangs)

    def why_not_ready(self) -> str:
        """One clause for a person."""
        return "; ".join(gang.why_not_ready() for gang in self._gangs) or "this router knows of none"

    def ready_views(self) -> list[gang_pb2.GangView]:
        """The newest view of every gang that can take a request.

        Raises:
            NotReady: there is none.
        """
        ready = [gang.view for gang in self._gangs if gang.is_ready and gang.view is not None]
        if not ready:
            raise NotReady(f"no gang is ready ({self.why_not_ready()}); try again later")
        return ready

    def context_length(self) -> int:
        """Tokens of prompt and output together that any ready gang takes.

        Raises:
            NotReady: no gang is ready.
        """
        return min(view.max_model_len for view in self.ready_views())

    def next_sequence_id(self) -> int:
        """Never the same twice."""
        return next(self._sequence_ids)

    def has_room(self, stream: Stream) -> bool:
        """A rank can start it now."""
        return self._pick(stream) is not None

    def can_take(self, stream: Stream) -> bool:
        """Some gang that is ready can; its ranks may have no room now."""
        return any(gang.is_ready and gang.suits(stream) for gang in self._gangs)

    def why_not(self, stream: Stream) -> str:
        """One clause for a person: why no gang can take it, or has."""
        reasons = []
        for gang in self._gangs:
            if not gang.is_ready:
                reasons.append(gang.why_not_ready())
            elif gang.view is not None and not gang.suits(stream):
                limits = f"computes in {gang.dtype} and takes {gang.view.max_model_len} tokens"
                reasons.append(f"{gang.view.gang_id} {limits}; needed are {stream.dtype} and {stream.request.cost}")
        return "; ".join(reasons) or "no rank has room"

    def why_failed(self, dtype: str = "") -> str:
        """One clause where every gang that computes in `dtype` has failed for good, empty where one has not."""
        gangs = [gang for gang in self._gangs if dtype in ("", gang.dtype) or not gang.dtype]
        views = [gang.view for gang in gangs if gang.view is not None and gang.has_failed]
        if len(views) < len(gangs):
            return ""
        return "; ".join(f"{view.gang_id} failed: {view.detail}" for view in views)

    def submit(self, stream: Stream) -> RankLink | None:
        """Sends a stream to the rank with room that will be free first.

        Returns:
            None when no rank has room; nothing was sent.
        """
        found = self._pick(stream)
        if found is None:
            return None
        link, stream.dtype = found
        link.submit(stream)
        return link

    def cancel(self, tenant: str, request_id: str, sibling: int | None = None) -> None:
        """Ends what other routers submitted of a request, at every rank that can be reached.

        Args:
            sibling: only this one of its outputs; None: all.
        """
        for gang in self._gangs:
            for link in gang.links.values():
                if link.is_connected:
                    link.cancel(tenant, request_id, sibling)

    async def close(self) -> None:
        """Ends every task and stream."""
        await asyncio.gather(*(gang.close() for gang in self._gangs))

    def _pick(self, stream: Stream) -> tuple[RankLink, str] | None:
        """A rank that the newest view calls ready, and what it computes in."""
        links = {
            (link.gang_id, link.rank): (link, gang.dtype)
            for gang in self._gangs
            if gang.is_ready and gang.suits(stream)
            for link in gang.links.values()
            if link.is_open
        }
        num_tokens = len(stream.request.prompt_ids) + len(stream.output_ids)
        choice = pick([link.candidate() for link, _ in links.values()], num_tokens) if links else None
        return None if choice is None else links[choice.gang_id, choice.rank]

    def _changed(self) -> None:
        self.on_change()
