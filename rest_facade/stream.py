"""A streamed answer as an HTTP response: events out, and comments while there are none.

An error leaves as an exception; the application's boundary makes the last event of it.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rest_facade.backend import CompletionStream
from rest_facade.connection import while_connected
from rest_facade.convert import Event
from rest_facade.sse import DONE, KEEP_ALIVE, ChunkWriter

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class EventStream(Response):
    """Sends `first` and all that follows it in `stream`, which it closes.

    `on_text` is called once, when the first text has been sent.
    """

    def __init__(
        self,
        first: Event | None,
        stream: CompletionStream,
        writer: ChunkWriter,
        keep_alive_seconds: float,
        on_text: Callable[[], None],
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._first = first
        self._stream = stream
        self._writer = writer
        self._keep_alive_seconds = keep_alive_seconds
        self._on_text = on_text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_all(send))
        finally:
            self._stream.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        has_text = False
        async with contextlib.aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                if not has_text and chunk is not KEEP_ALIVE:
                    has_text = True
                    self._on_text()
        assert self._writer.complete, "The stream ended without its usage. This is a bug."
        await send({"type": "http.response.body", "body": DONE})

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        clock = asyncio.get_running_loop().time
        event, sent_at, reading = self._first, clock(), None
        try:
            while event is not None:
                if chunk := self._writer.push(event):
                    yield chunk
                    sent_at = clock()
                reading = asyncio.ensure_future(self._stream.read())
                while not reading.done():
                    silence_left = sent_at + self._keep_alive_seconds - clock()
                    await asyncio.wait((reading,), timeout=max(silence_left, 0))
                    if not reading.done():
                        yield KEEP_ALIVE
                        sent_at = clock()
                event = reading.result()
        finally:
            if reading is not None:
                reading.cancel()
