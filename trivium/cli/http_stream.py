"""HTTP/1.1 and server-sent events for a load generator, with almost no work during the measurement.

A connection only records which bytes arrived when. Parsing is deferred until all streams have
ended, since it would take CPU time from the server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from trivium.cli.answer import Answer, AnswerFailed, http_error

Pieces = Sequence[tuple[float, bytes]]

_LINE_END, _HEAD_END, _LAST_CHUNK = b"\r\n", b"\r\n\r\n", b"\r\n0\r\n\r\n"


class Connection(asyncio.Protocol):
    """A persistent connection, for one request at a time. `pieces` are the response's bytes."""

    def __init__(self) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.is_open = False
        self._transport: Any = None  # uvloop's are not asyncio.Transport
        self._whole: asyncio.Future[None] | None = None
        self._tail = b""
        self._head = b""
        self._left: int | None = None  # bytes, of a body with a Content-Length

    async def send(self, request: bytes) -> Pieces:
        """Sends a request; returns the response's pieces, so far if the server hangs up."""
        assert self._transport is not None
        self.pieces, self._tail, self._head, self._left = [], b"", b"", None
        self._whole = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._whole
        return self.pieces

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.is_open = transport, True

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))
        self._tail = (self._tail + data[-len(_LAST_CHUNK) :])[-len(_LAST_CHUNK) :]
        if self._tail == _LAST_CHUNK or self._has_length(data):
            self._end()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._end()

    def _has_length(self, data: bytes) -> bool:
        """Whether this ends a body with a Content-Length, as errors have."""
        if self._left is None:
            self._head += data
            head, found, data = self._head.partition(_HEAD_END)
            if not found:
                return False
            length = headers(head).get(b"content-length")
            self._left = -1 if length is None else int(length)
        if self._left < 0:
            return False
        self._left -= len(data)
        return self._left <= 0

    def _end(self) -> None:
        if self._whole is not None and not self._whole.done():
            self._whole.set_result(None)


class Unchunker:
    """Decodes a chunked body from pieces of any size."""

    def __init__(self) -> None:
        self._rest = b""
        self._left = 0  # of the current chunk, including its final CRLF

    def push(self, piece: bytes) -> bytes:
        """The part of the body that `piece` completes."""
        data, body = self._rest + piece, []
        while data:
            if self._left:
                taken, data = data[: self._left], data[self._left :]
                # The CRLF after a chunk may arrive later than the chunk, or in two pieces.
                body.append(taken[: max(self._left - len(_LINE_END), 0)])
                self._left -= len(taken)
                continue
            line, found, after = data.partition(_LINE_END)
            if not found:
                break
            data = after
            self._left = int(line.partition(b";")[0], 16) + len(_LINE_END)
        self._rest = data
        return b"".join(body)


def headers(head: bytes) -> dict[bytes, bytes]:
    """Headers by lower-case name."""
    lines = (line.partition(b":") for line in head.split(_LINE_END)[1:])
    return {name.strip().lower(): value.strip() for name, _, value in lines}


def read_answer(began: float, pieces: Pieces) -> Answer:
    """Parses a stream with its timings; raises AnswerFailed if it is incomplete."""
    try:
        answer = _read(began, pieces)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise AnswerFailed(f"{type(error).__name__}: {error}") from error
    if not answer.complete:
        raise AnswerFailed("the stream ended without [DONE]")
    return answer


def _read(began: float, pieces: Pieces) -> Answer:
    whole = b"".join(data for _, data in pieces)
    head, found, body = whole.partition(_HEAD_END)
    if not found:
        raise AnswerFailed("the server closed the connection without a response")
    known = headers(head)
    is_chunked = known.get(b"transfer-encoding", b"").lower() == b"chunked"
    if head.split()[1] != b"200":
        body = Unchunker().push(body) if is_chunked else body
        raise http_error(int(head.split()[1]), body)
    answer, unchunker = Answer(began), Unchunker()
    skip = len(head) + len(_HEAD_END)
    for when, data in pieces:
        skipped, skip = data[skip:], max(skip - len(data), 0)
        answer.push(unchunker.push(skipped) if is_chunked else skipped, when)
    return answer
