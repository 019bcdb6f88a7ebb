"""What never reaches the application: requests that are not HTTP, or whose head is too large."""

import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from trivium.wire.errors import ServiceError

MAX_HEADERS = 100
MAX_HEAD_BYTES = 64 * 1024


class EdgeProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits on a request's head, and its only own answer in JSON."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0

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

    def send_400_response(self, msg: str) -> None:
        """Answers `msg` as an error object, and hangs up."""
        body = json.dumps(ServiceError("invalid_value", msg).body()).encode()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
