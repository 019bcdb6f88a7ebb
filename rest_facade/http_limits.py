"""Limits on request heads and on clients that stop reading, and errors for invalid HTTP, below the
ASGI application."""

import asyncio
import contextlib
import fcntl
import json
import socket
import sys
import termios
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from trivium.wire.errors import ServiceError

MAX_HEADERS = 100
MAX_HEAD_BYTES = 64 * 1024
_MAX_PIPELINED = 8  # requests that may wait on a connection
_TLS_CLOSE_SECONDS = 1.0


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits on a request's head, and its own 400 response in JSON.

    A client may offer to upgrade to another protocol (`Upgrade: h2c`, as Java's does), which a
    server may ignore. The parser cannot: it considers the request complete without its body. So it
    is fed the same head again, without the offer.

    When a client disconnects, uvicorn cancels only the connection's last request, and it stops
    reading at a pipelined one, so that it would not even notice. Here the request being answered is
    cancelled too, and reading goes on until several pipelined requests are waiting.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _answering: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if sys.platform == "linux":
            # No other limit ends a request whose client has stopped reading. Only the kernel knows
            # what a client reads: its buffers and those of TLS may hold all that is sent.
            transport.get_extra_info("socket").setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * self.timeout_keep_alive
            )
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def shutdown(self) -> None:
        super().shutdown()
        # With TLS it is not closed until the client closes it too, which an idle one may not do.
        self.loop.call_later(_TLS_CLOSE_SECONDS, self._abort_if_closing)

    def _abort_if_closing(self) -> None:
        is_open = self in self.connections
        if is_open and self.transport.is_closing() and not self._unread_bytes():
            self.transport.abort()

    def _unread_bytes(self) -> int:
        """Bytes that wait here or in the kernel."""
        queued = bytes(4)
        with contextlib.suppress(OSError):  # Linux only
            queued = fcntl.ioctl(
                self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued
            )
        return self.transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)

    def _time_head(self) -> None:
        """Starts the timer for a complete head: the time that a connection may be idle."""
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)

    def _stop_head_timer(self) -> None:
        # uvicorn's timer, which starts after an answer, has to outlast any data but a head: blank
        # lines, or the rest of a body, would otherwise keep the connection open without end.
        self._unset_keepalive_if_required()
        if self._head_timer is not None:
            self._head_timer.cancel()

    def _close_if_idle(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering:
            self._time_head()  # the next request has begun, and may be slow after the answer too
        else:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        try:
            while data:
                data = self._parse(data)
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")

    def _parse(self, data: bytes) -> bytes:
        """Parses `data`; returns what remains to be parsed."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return self._head_without_upgrade() + data[upgrade.args[0] :]
        return b""

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join((*lines, b"", b""))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._time_head()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def _count(self, added: int) -> None:
        self._head_bytes += added
        if self._head_bytes > MAX_HEAD_BYTES or len(self.headers) >= MAX_HEADERS:
            raise ValueError("the head of the request is too large")

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("this is not a proxy")
        if not self.parser.should_upgrade():
            self._stop_head_timer()
            super().on_headers_complete()
            if len(self.pipeline) <= _MAX_PIPELINED:
                self.flow.resume_reading()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Responds with `msg` as an error object, and closes the connection."""
        body = json.dumps(ServiceError("invalid_value", msg).body()).encode()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
