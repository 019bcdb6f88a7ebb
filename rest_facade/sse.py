"""Server-sent events as bytes. Knows nothing about HTTP, gRPC or the content of events."""

from typing import Any

from rest_facade.json_encoding import encode

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def sse_event(body: Any) -> bytes:
    """One event with `body` as JSON."""
    return b"data: " + encode(body) + b"\n\n"
