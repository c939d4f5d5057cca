"""All generations of a router by the names their clients gave them, and how long those outlive their connections."""

import asyncio

from router.errors import InvalidRequest
from router.generation import Generation
from router.stream import Reader
from router.validation import ValidRequest

Key = tuple[str, str, int]
"""Tenant, request id, sibling."""


class Registry:
    """Finds generations again.

    Args:
        retention_s: seconds a resumable generation is kept without a connection, running or ended.
        max_retained_tokens: tokens of ended ones kept at most: the oldest go.
    """

    def __init__(self, retention_s: float, max_retained_tokens: int) -> None:
        self._retention_s = retention_s
        self._max_retained_tokens = max_retained_tokens
        # Of all that run, by tenant and request id: for Cancel.
        self._running: dict[tuple[str, str], set[Generation]] = {}
        self._resumable: dict[Key, Generation] = {}
        # Those without a connection, the oldest first, and those of them that have ended with their weight.
        self._alone: dict[Key, asyncio.TimerHandle] = {}
        self._ended: dict[Key, int] = {}
        self._retained_tokens = 0

    def find(self, request: ValidRequest) -> Generation | None:
        """The generation of a resumable request that came again; None where this router has none.

        Raises:
            InvalidRequest: the request is not the same.
        """
        found = self._resumable.get(_key(request))
        if found is None:
            return None
        if not request.resumable or found.request.identity != request.identity:
            raise InvalidRequest(
                "request_id", f"{request.request_id!r} names another resumable request; send that one, or take a new id"
            )
        if request.has_seed and request.sampling.seed != found.request.sampling.seed:
            raise InvalidRequest("seed", f"this request draws with {found.request.sampling.seed}")
        return found

    def add(self, generation: Generation) -> None:
        """A new generation, with a connection."""
        request = generation.request
        if not generation.is_over:
            self._running.setdefault((request.tenant, request.request_id), set()).add(generation)
        if request.resumable:
            self._resumable[_key(request)] = generation

    def ended(self, generation: Generation) -> None:
        """A generation came to its end. One that failed is not kept: it is generated again when its client resumes."""
        request = generation.request
        name = (request.tenant, request.request_id)
        if same := self._running.get(name):
            same.discard(generation)
            if not same:
                del self._running[name]
        key = _key(request)
        if self._resumable.get(key) is not generation:
            return
        ending = generation.stream.ending
        if ending is not None and not ending.is_complete:
            self._forget(key)
        elif key in self._alone:
            self._keep(key, generation)

    def connected(self, generation: Generation) -> None:
        """A client reads it again."""
        key = _key(generation.request)
        if self._resumable.get(key) is not generation:
            return  # Of the same name only: what is kept under it is another's.
        if timer := self._alone.pop(key, None):
            timer.cancel()
        self._retained_tokens -= self._ended.pop(key, 0)

    def disconnected(self, generation: Generation, reader: Reader) -> None:
        """A connection ended. Without another one a generation that is not resumable ends with it."""
        if not generation.stream.is_read_by(reader):
            return
        if not generation.request.resumable:
            generation.abort()
            return
        key = _key(generation.request)
        if self._resumable.get(key) is not generation:
            return
        loop = asyncio.get_running_loop()
        self._alone[key] = loop.call_later(self._retention_s, self._expire, key)
        if generation.is_over:
            self._keep(key, generation)

    def cancel(self, tenant: str, request_id: str) -> bool:
        """Ends all generations of a request; False where there is none."""
        kept = [key for key in self._resumable if key[:2] == (tenant, request_id)]
        running = list(self._running.get((tenant, request_id), ()))
        for generation in running:
            generation.cancel()
        for key in kept:
            self._forget(key)
        return bool(kept or running)

    def close(self) -> None:
        """Ends everything that has no connection."""
        for key in list(self._alone):
            self._expire(key)

    def _keep(self, key: Key, generation: Generation) -> None:
        self._ended[key] = generation.weight
        self._retained_tokens += generation.weight
        while self._retained_tokens > self._max_retained_tokens and len(self._ended) > 1:
            self._forget(next(iter(self._ended)))

    def _expire(self, key: Key) -> None:
        generation = self._resumable.get(key)
        self._forget(key)
        if generation is not None:
            generation.abort()

    def _forget(self, key: Key) -> None:
        self._resumable.pop(key, None)
        self._retained_tokens -= self._ended.pop(key, 0)
        if timer := self._alone.pop(key, None):
            timer.cancel()


def _key(request: ValidRequest) -> Key:
    return (request.tenant, request.request_id, request.sibling)
