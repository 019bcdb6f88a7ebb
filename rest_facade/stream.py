"""A streamed answer as an HTTP response: events out, and comments while there are none.

An error leaves as an exception; the application's boundary makes the last event of it.
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

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


Event = TypeVar("Event")


class EventStream(Response):
    """Sends the chunks of a stream, the `first` ones and those of all events that follow in
    `stream`, which it closes.

    While the first ones are still to come, a comment goes out at once. `on_text` is called once,
    when the first text has been sent.
    """

    def __init__(
        self,
        first: asyncio.Task[Sequence[Any] | None],
        stream: CompletionStream[Event],
        converter: Chunks[Any],
        keep_alive_seconds: float,
        on_text: Callable[[], None],
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._first = first
        self._stream = stream
        self._converter = converter
        self._keep_alive_seconds = keep_alive_seconds
        self._on_text = on_text
        self._clock = asyncio.get_running_loop().time
        self._sent_at = self._clock() if first.done() else -math.inf

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
                    usage = body  # goes out with the end, which comes with it
                elif body:
                    await self._send(send, body)
                    if not has_text:
                        has_text = True
                        self._on_text()
                event = await self._stream.read()
                chunks = None if event is None else self._converter.push(event)
        finally:
            keep_alives.cancel()
        assert self._converter.complete, "The stream ended without its usage. This is a bug."
        await send({"type": "http.response.body", "body": usage + DONE})

    async def _send_keep_alives(self, send: Send) -> None:
        # A task of its own, as a timeout around every read would cost more than the read.
        while True:
            silent_for = self._clock() - self._sent_at
            if silent_for >= self._keep_alive_seconds:
                await self._send(send, KEEP_ALIVE)
            else:
                await asyncio.sleep(self._keep_alive_seconds - silent_for)

    async def _send(self, send: Send, body: bytes) -> None:
        self._sent_at = self._clock()
        await send({"type": "http.response.body", "body": body, "more_body": True})
