"""Any number of clients of an OpenAI-compatible server, and what they measured.

A client only records what arrives and when. Parsing is deferred until all have finished, since it
may take CPU time from the server. Prints nothing.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import numpy as np

from trivium.cli.answer import Answer, AnswerFailed, headers
from trivium.cli.http_stream import Connection, Pieces, read_answer
from trivium.cli.https import tls_context

PERCENTILES = (50, 95, 99)
ANSWER_SECONDS = 900.0  # for a whole answer

Message = dict[str, str]


@dataclass(frozen=True)
class Target:
    """A server and one of its models. `root` is the URL that ends in /v1; `context`, for https:
    URLs, has the trusted CAs, by default those of certifi."""

    root: str
    model: str
    api_key: str | None = None
    ignore_eos: bool = True
    context: ssl.SSLContext | None = None

    def body(
        self, messages: Sequence[Message], output_tokens: int, n: int = 1, stream: bool = True
    ) -> dict[str, object]:
        """One request's body. Greedy, so that the speed does not depend on the server's sampler."""
        body: dict[str, object] = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": stream,
        }
        if n > 1:
            body["n"] = n
        if self.ignore_eos:
            body["ignore_eos"] = True
        if stream:
            body["stream_options"] = {"include_usage": True}
        return body

    def request(self, body: dict[str, object]) -> bytes:
        """The bytes of an HTTP request for a chat completion."""
        content = json.dumps(body).encode()
        parts = urlsplit(self.root)
        lines = [
            f"POST {parts.path}/chat/completions HTTP/1.1",
            f"Host: {parts.netloc}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            f"Content-Length: {len(content)}",
            *(f"{name}: {value}" for name, value in headers(self.api_key).items()),
        ]
        return "\r\n".join([*lines, "", ""]).encode() + content


class Client:
    """Sends one request after another on its own connection, which the first one opens."""

    def __init__(self, target: Target) -> None:
        address = urlsplit(target.root)
        if address.scheme not in ("http", "https") or address.hostname is None:
            raise ValueError(f"{target.root}: only http:// and https:// URLs are supported")
        is_secure = address.scheme == "https"
        self._address = address.hostname, address.port or (443 if is_secure else 80)
        self._ssl = (target.context or tls_context(None)) if is_secure else None
        self._connection: Connection | None = None

    @property
    def pieces(self) -> Pieces:
        """The current response's pieces so far."""
        return self._connection.pieces if self._connection is not None else ()

    async def send(self, request: bytes) -> Pieces:
        """The response's pieces, until it ends or the server hangs up; see read_answer.

        Raises OSError if the server cannot be reached, TimeoutError if the response does not end.
        """
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                pieces: Pieces = ()
                if self._connection is not None and self._connection.is_open:
                    pieces = await self._connection.send(request)
                if not pieces:  # a kept connection may be closed while a request is sent
                    self._connection = await self._connect()
                    pieces = await self._connection.send(request)
                return pieces
        except BaseException:
            self.close()  # else the rest would arrive before the next response
            raise

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, *self._address, ssl=self._ssl)
        return connection


@dataclass(frozen=True)
class Level:
    """The results of a number of concurrent clients."""

    clients: int
    seconds: float
    answers: Sequence[Answer]
    failures: Sequence[str]

    def summary(self) -> dict[str, object]:
        """The numbers as a JSON object: times in seconds, percentiles by name."""
        completion = sum(answer.completion_tokens for answer in self.answers)
        first = [answer.first_token_seconds for answer in self.answers]
        return {
            "clients": self.clients,
            "requests": len(self.answers) + len(self.failures),
            "failures": len(self.failures),
            "seconds": round(self.seconds, 4),
            "prompt_tokens": self._total("prompt_tokens"),
            "cached_tokens": sum(
                (answer.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                for answer in self.answers
            ),
            "completion_tokens": completion,
            "gpu_seconds": self._total("gpu_seconds"),
            "output_tokens_per_second": round(completion / self.seconds, 2),
            "time_to_first_token": percentiles([value for value in first if value is not None]),
            "time_between_tokens": percentiles([g for answer in self.answers for g in answer.gaps]),
            "request_seconds": percentiles([a.ended - a.began for a in self.answers]),
        }

    def _total(self, key: str) -> float:
        return round(sum(answer.usage.get(key) or 0 for answer in self.answers), 6)


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95 and p99 of `values`, linearly interpolated; None without values."""
    if not values:
        return None
    found = np.percentile(values, PERCENTILES)
    return {
        f"p{rank}": round(float(value), 6) for rank, value in zip(PERCENTILES, found, strict=True)
    }


async def run_level(
    target: Target, draw: Callable[[], str], clients: int, requests: int, output_tokens: int
) -> Level:
    """Runs `clients` clients, each of which sends `requests` requests one after the other.

    `draw` returns a prompt.
    """
    responses: list[tuple[float, Pieces | Exception]] = []

    async def one_client() -> None:
        client = Client(target)
        for _ in range(requests):
            body = target.body([{"role": "user", "content": draw()}], output_tokens)
            began = time.perf_counter()
            try:
                responses.append((began, await client.send(target.request(body))))
            except OSError as error:  # TimeoutError is one
                responses.append((began, error))
        client.close()

    began = time.perf_counter()
    await asyncio.gather(*(one_client() for _ in range(clients)))
    seconds = time.perf_counter() - began
    answers, failures = [], []
    for began, result in responses:
        try:
            if isinstance(result, Exception):
                raise result
            answers.append(read_answer(began, result))
        except (AnswerFailed, OSError) as error:
            failures.append(f"{type(error).__name__}: {error}")
    return Level(clients, seconds, answers, failures)


def open_client(target: Target) -> httpx.AsyncClient:
    """A client for requests that are not streamed: the list of models, and token counts."""
    return httpx.AsyncClient(
        headers=headers(target.api_key),
        timeout=60.0,
        trust_env=False,
        verify=target.context or tls_context(None),
    )
