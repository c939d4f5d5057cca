"""Bounds on a request's body: how long it is, and how long it takes to come."""

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.http_errors import ApiError


class BodyLimit:
    """Refuses bodies that are too long with 413, unread where their length is announced, and too slow ones with 408.

    Args:
        app: what gets the rest.
        max_bytes: of the longest body.
        timeout_s: for the whole body to arrive.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._sentence = f"the body is longer than {max_bytes} bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if announced.isdigit() and int(announced[:20]) > self._max_bytes:
            await ApiError(413, self._sentence).response()(scope, receive, send)
            return
        await self._app(scope, self._bounded(receive), send)

    def _bounded(self, receive: Receive) -> Receive:
        size = 0
        is_whole = False
        deadline = asyncio.get_running_loop().time() + self._timeout_s

        async def bounded() -> Message:
            nonlocal size, is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {self._timeout_s:g} s") from None
            size += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if size > self._max_bytes:
                raise HTTPException(413, self._sentence)
            return message

        return bounded
