"""One streamed answer as its reader sees it: the text, when each part came, and what it cost.

Works with any OpenAI-compatible server. Does no input or output.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Any

from trivium.cli.sse import DONE, SseDecoder


class AnswerFailed(Exception):
    """The server refused, or broke off with an error; the text is what it said."""


@dataclass
class Answer:
    """Collects the chunks of one stream. Times are in seconds on one monotonic clock."""

    began: float
    ended: float = 0.0
    text: str = ""
    times: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    complete: bool = False
    _decoder: SseDecoder = field(default_factory=SseDecoder)

    def push(self, piece: bytes, now: float) -> str:
        """Takes bytes that came at `now`; returns the text in them. Raises AnswerFailed."""
        self.ended = now
        return "".join(self._take(data, now) for data in self._decoder.push(piece))

    def _take(self, data: str, now: float) -> str:
        if data == DONE:
            self.complete = True
            return ""
        chunk = json.loads(data)
        if "error" in chunk:
            raise AnswerFailed(error_message(chunk))
        self.usage = chunk.get("usage") or self.usage
        new = ""
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta") or {}
            new += delta.get("content") or delta.get("reasoning_content") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if new:
            self.times.append(now)
            self.text += new
        return new

    @property
    def completion_tokens(self) -> int:
        """As the server counts them, or the number of parts where it does not."""
        return int(self.usage.get("completion_tokens", len(self.times)))

    @property
    def first_token_seconds(self) -> float | None:
        """From the request to the first text; None when there was none."""
        return self.times[0] - self.began if self.times else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between one part of the text and the next."""
        return [after - before for before, after in itertools.pairwise(self.times)]

    @property
    def tokens_per_second(self) -> float | None:
        """Of the stream after its first part; None when there is nothing to divide."""
        if len(self.times) < 2 or self.completion_tokens < 2:
            return None
        return (self.completion_tokens - 1) / (self.times[-1] - self.times[0])


def error_message(body: object) -> str:
    """What an OpenAI error object says, or the object itself when it is something else."""
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        return str(body["error"].get("message"))
    return str(body)


def api_root(url: str) -> str:
    """`url` with or without a trailing slash or /v1, as the base of /chat/completions."""
    root = url.rstrip("/")
    return root if root.endswith("/v1") else f"{root}/v1"


def headers(api_key: str | None) -> dict[str, str]:
    """Headers of every request."""
    plain = {"Accept-Encoding": "identity"}
    return {**plain, "Authorization": f"Bearer {api_key}"} if api_key else plain
