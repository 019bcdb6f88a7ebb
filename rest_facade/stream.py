"""A streamed HTTP response: sends events, and keep-alive comments while there are none.

Errors are raised; ErrorMiddleware sends them as the last event.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rest_facade.backend import CompletionStream
from rest_facade.connection import while_connected
from rest_facade.convert.chunks import Chunks
from rest_facade.sse import DONE, KEEP_ALIVE, sse_event
from trivium.offload import INLINE_ANSWER_BYTES, offload

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


Event = TypeVar("Event")


class EventStream(Response):
    """Sends the chunks of all events in `stream`, and closes it. Call `begin` before sending it.

    `on_begin` is called once the first event has arrived, `on_text` once the first text was sent.
    """

    def __init__(
        self,
        stream: CompletionStream[Event],
        converter: Chunks[Any],
        keep_alive_seconds: float,
        on_begin: Callable[[], None],
        on_text: Callable[[], None],
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._stream = stream
        self._converter = converter
        self._keep_alive_seconds = keep_alive_seconds
        self._on_begin = on_begin
        self._on_text = on_text
        self._clock = asyncio.get_running_loop().time
        self._sent_at = -math.inf
        self._first = asyncio.create_task(self._read_first())

    async def begin(self, receive: Receive) -> None:
        """Awaits the first event, so that early failures get their own HTTP status; but no longer
        than `keep_alive_seconds`, as proxies give up on silent connections.

        Raises ServiceError or ClientDisconnected.
        """
        try:
            first = asyncio.wait([self._first], timeout=self._keep_alive_seconds)
            await while_connected(receive, first)
            if self._first.done():
                self._first.result()
                self._sent_at = self._clock()  # otherwise a comment is sent at once
        except BaseException:
            self._first.cancel()
            self._stream.close()
            raise

    async def _read_first(self) -> Sequence[Any] | None:
        event = await self._stream.read()
        self._on_begin()
        return await self._chunks(event)

    async def _chunks(self, event: Any) -> Sequence[Any] | None:
        """The chunks of an event; None at the end."""
        if event is None:
            return None
        return await offload(
            event.ByteSize(), lambda: self._converter.push(event), INLINE_ANSWER_BYTES
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_all(send))
        finally:
            self._stream.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        keep_alives = asyncio.create_task(self._send_keep_alives(send))
        usage, has_text = b"", False
        try:
            chunks = await self._first
            while chunks is not None:
                body = b"".join(map(sse_event, chunks))
                if self._converter.complete:
                    usage = body  # sent together with the end
                elif body:
                    await self._send(send, body)
                    if not has_text:
                        has_text = True
                        self._on_text()
                chunks = await self._chunks(await self._stream.read())
        finally:
            keep_alives.cancel()
        assert self._converter.complete, "The stream ended without its usage. This is a bug."
        await send({"type": "http.response.body", "body": usage + DONE})

    async def _send_keep_alives(self, send: Send) -> None:
        # A separate task, as a timeout around every read would cost more than the read.
        while True:
            silent_for = self._clock() - self._sent_at
            if silent_for >= self._keep_alive_seconds:
                await self._send(send, KEEP_ALIVE)
            else:
                await asyncio.sleep(self._keep_alive_seconds - silent_for)

    async def _send(self, send: Send, body: bytes) -> None:
        self._sent_at = self._clock()
        await send({"type": "http.response.body", "body": body, "more_body": True})
