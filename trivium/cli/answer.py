"""One streamed answer as the client sees it: the text, when each part arrived, and its usage.

Works with any OpenAI-compatible server. Does no I/O.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trivium.cli.sse import DONE, SseDecoder


class AnswerFailed(Exception):
    """The server refused the request or broke off with an error, which the message quotes."""


@dataclass
class Answer:
    """Collects the chunks of one stream. Times are in seconds on one monotonic clock.

    `parts` maps each choice to the times of its events with text; `ends`, to when it finished.
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
        """Takes bytes that arrived at `now`; returns the first choice's text in them.

        Raises AnswerFailed.
        """
        self.ended = now
        with parsing():
            return "".join(self._process(data, now) for data in self._decoder.push(piece))

    def _process(self, data: str, now: float) -> str:
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
        if counted is not None:  # sent once, or by some servers once per choice
            self.completion_tokens = counted + (self.completion_tokens if self.usage else 0)
        self.usage = usage or self.usage

    @property
    def first_token_seconds(self) -> float | None:
        """From the request until every choice had text; None if none had any."""
        return max(times[0] for times in self.parts.values()) - self.began if self.parts else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between consecutive parts of each choice's text."""
        pairs = (itertools.pairwise(times) for times in self.parts.values())
        return [after - before for before, after in itertools.chain(*pairs)]

    @property
    def tokens_per_second(self) -> float | None:
        """The rate after the first part; None if there are too few parts or tokens."""
        times = sorted(itertools.chain(*self.parts.values()))
        if len(times) < 2 or self.completion_tokens < 2:
            return None
        return (self.completion_tokens - 1) / (times[-1] - times[0])


@contextlib.contextmanager
def parsing() -> Iterator[None]:
    """Wraps the parsing of a response; raises AnswerFailed if it is not one of OpenAI's API."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise AnswerFailed(f"the response is not one of OpenAI's API ({reason})") from error


def first_model(status: int, body: bytes) -> str:
    """The id of the first model in the response of /v1/models; raises AnswerFailed."""
    if status != 200:
        raise http_error(status, body)
    with parsing():
        models = json.loads(body)["data"]
        if not models:
            raise AnswerFailed("the server lists no models; choose one with --model")
        return str(models[0]["id"])


def http_error(status: int, body: bytes) -> AnswerFailed:
    """The error for a response with a status other than 200."""
    try:
        message = error_message(json.loads(body))
    except ValueError:
        message = body[:200].decode("utf-8", "replace")
    return AnswerFailed(f"HTTP {status}: {message}")


def error_message(body: object) -> str:
    """The message of an OpenAI error object, or any other body as text."""
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        return str(body["error"].get("message"))
    return str(body)


def api_root(url: str) -> str:
    """The base URL of /chat/completions, from a `url` with or without a trailing slash or /v1."""
    root = url.rstrip("/")
    return root if root.endswith("/v1") else f"{root}/v1"


def headers(api_key: str | None) -> dict[str, str]:
    """The headers sent with every request."""
    plain = {"Accept-Encoding": "identity"}
    return {**plain, "Authorization": f"Bearer {api_key}"} if api_key else plain
