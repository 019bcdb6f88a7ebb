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
    """Collects the chunks of one stream. Times are in seconds on one monotonic clock.

    `parts` has, for each choice, when each of its events with text came; `ends`, when it finished.
    """

    began: float
    ended: float = 0.0
    text: str = ""  # of the first choice
    parts: dict[int, list[float]] = field(default_factory=dict)
    ends: dict[int, float] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    completion_tokens: int = 0  # as the server counts them, or the number of parts if it does not
    finish_reason: str | None = None
    complete: bool = False
    _decoder: SseDecoder = field(default_factory=SseDecoder)

    def push(self, piece: bytes, now: float) -> str:
        """Takes bytes that came at `now`; returns the first choice's text in them.

        Raises AnswerFailed.
        """
        self.ended = now
        return "".join(self._take(data, now) for data in self._decoder.push(piece))

    def _take(self, data: str, now: float) -> str:
        if data == DONE:
            self.complete = True
            return ""
        chunk = json.loads(data)
        if "error" in chunk:
            raise AnswerFailed(error_message(chunk))
        texts = {}
        for choice in chunk.get("choices", ()):
            delta, index = choice.get("delta") or {}, choice["index"]
            texts[index] = delta.get("content") or delta.get("reasoning_content") or ""
            if texts[index]:
                self.parts.setdefault(index, []).append(now)
                self.completion_tokens += not self.usage
            if choice.get("finish_reason"):
                self.finish_reason, self.ends[index] = choice["finish_reason"], now
        self._count(chunk.get("usage") or {})
        self.text += texts.get(0, "")
        return texts.get(0, "")

    def _count(self, usage: dict[str, Any]) -> None:
        counted = usage.get("completion_tokens")
        if counted is not None:  # one usage, but for servers that send one for each choice
            self.completion_tokens = counted + (self.completion_tokens if self.usage else 0)
        self.usage = usage or self.usage

    @property
    def first_token_seconds(self) -> float | None:
        """From the request until every choice had text; None when there was none."""
        return max(times[0] for times in self.parts.values()) - self.began if self.parts else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between one part of a choice's text and the next."""
        pairs = (itertools.pairwise(times) for times in self.parts.values())
        return [after - before for before, after in itertools.chain(*pairs)]

    @property
    def tokens_per_second(self) -> float | None:
        """Of the stream after its first part; None when there is nothing to divide."""
        times = sorted(itertools.chain(*self.parts.values()))
        if len(times) < 2 or self.completion_tokens < 2:
            return None
        return (self.completion_tokens - 1) / (times[-1] - times[0])


def refusal(status: int, body: bytes) -> AnswerFailed:
    """What a server says with another status than 200."""
    try:
        message = error_message(json.loads(body))
    except ValueError:
        message = body[:200].decode("utf-8", "replace")
    return AnswerFailed(f"HTTP {status}: {message}")


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
