"""All gangs a router can reach: what their leaders say, and a link to each of their ranks."""

import asyncio
import itertools
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence

from protos import gang_pb2
from router.config import RouterConfig
from router.errors import NotReady
from router.gang_view import GangWatcher, LeaderResolver
from router.metrics import RouterMetrics
from router.policy import pick
from router.rank_link import RankLink
from router.stream import Stream

logger = logging.getLogger(__name__)

READY, DEAD, FAILED = "ready", "dead", "failed"


class Gang:
    """One gang: the newest view of it, and links to its ranks. Must be made in a running event loop.

    Attributes:
        view: what the leader said last; None until it is reached.
        links: one to every rank that takes part in the epoch, by rank, incarnation and address.
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
        self.links: dict[tuple[int, int, str], RankLink] = {}
        self._router_id = router_id
        self._config = config
        self._metrics = metrics
        self._on_change = on_change
        self._runs: dict[tuple[int, int, str], asyncio.Task[None]] = {}
        self._watcher = GangWatcher(router_id, resolve, self.take_view, config.watch_silence_s, config.reconnect_max_s)
        self._watch = asyncio.create_task(self._watcher.run(), name="gang-watch")

    @property
    def is_ready(self) -> bool:
        """The leader said so last, and a rank can be reached."""
        return (
            self.view is not None
            and self.view.state == READY
            and any(link.is_connected for link in self.links.values())
        )

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
        self.view = view
        members = {
            (member.rank, member.incarnation, member.address): member
            for member in view.ranks
            if member.state != DEAD and member.address
        }
        for key in self.links.keys() - members.keys():
            self._close(key, f"{self.links[key]} died; send the request again")
        if view.state == FAILED:
            for key in list(self.links):
                self._close(key, f"{view.gang_id} failed: {view.detail}")
            self._on_change()
            return
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
        self._on_change()

    def _close(self, key: tuple[int, int, str], detail: str) -> None:
        self._runs.pop(key).cancel()
        self.links.pop(key).fail_streams(detail)

    async def close(self) -> None:
        """Ends every task and stream."""
        tasks = [self._watch, *self._runs.values()]
        for key in list(self.links):
            self._close(key, "the router shuts down; send the request again")
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

    def has_room(self, prompt_tokens: int) -> bool:
        """A rank can start such a sequence now."""
        return self._pick(prompt_tokens) is not None

    def submit(self, stream: Stream) -> RankLink | None:
        """Sends a stream to the rank with room that will be free first.

        Returns:
            None when no rank has room; nothing was sent.
        """
        link = self._pick(len(stream.request.prompt_ids))
        if link is not None:
            link.submit(stream)
        return link

    def cancel(self, tenant: str, request_id: str, sibling: int | None = None) -> None:
        """Ends what other routers submitted of a request, at every rank that can be reached.

        Args:
            sibling: only this one of its outputs; None: all.
        """
        for link in self._links():
            link.cancel(tenant, request_id, sibling)

    async def close(self) -> None:
        """Ends every task and stream."""
        await asyncio.gather(*(gang.close() for gang in self._gangs))

    def _links(self) -> Iterator[RankLink]:
        for gang in self._gangs:
            if gang.is_ready:
                yield from (link for link in gang.links.values() if link.is_connected)

    def _pick(self, prompt_tokens: int) -> RankLink | None:
        links = {(link.gang_id, link.rank): link for link in self._links()}
        choice = pick([link.candidate() for link in links.values()], prompt_tokens) if links else None
        return None if choice is None else links[choice.gang_id, choice.rank]

    def _changed(self) -> None:
        self.on_change()
