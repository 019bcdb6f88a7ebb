"""Server-sent events as bytes. Knows nothing of HTTP, gRPC or what an event says."""

from typing import Any

from rest_facade.json_encoding import encode

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def sse_event(body: Any) -> bytes:
    """`body` as the JSON of one event."""
    return b"data: " + encode(body) + b"\n\n"
