"""Decodes server-sent events: bytes in, the data of complete events out."""

from __future__ import annotations

DONE = "[DONE]"


class SseDecoder:
    """Decodes a stream from pieces of any size. Comments and fields other than data are dropped."""

    def __init__(self) -> None:
        self._tail = b""

    def push(self, piece: bytes) -> list[str]:
        """The data of every event that `piece` completes."""
        *whole, self._tail = (self._tail + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        return [data for event in whole if (data := _data(event)) is not None]

    def flush(self) -> list[str]:
        """The data of a final event without its blank line."""
        return self.push(b"\n\n")


def _data(event: bytes) -> str | None:
    lines = [
        line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")
    ]
    return b"\n".join(lines).decode("utf-8", "replace") if lines else None
