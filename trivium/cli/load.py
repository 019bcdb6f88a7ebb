"""A closed loop of clients against an OpenAI-compatible server, and what they saw.

Each client sends its next request when its last one is answered. Prints nothing.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import numpy as np

from trivium.cli.answer import Answer, AnswerFailed, error_message

# Words that most tokenizers take as one token each.
_TEXT = (
    "time year people way day man thing woman life child world school state family student "
    "group country problem hand part place case week company system program question work "
    "government number night point home water room mother area money story fact month lot "
    "right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city name president team minute idea kid body"
)
WORDS = _TEXT.split()
PERCENTILES = (50, 95, 99)
TIMEOUT = httpx.Timeout(600.0, connect=30.0)


@dataclass(frozen=True)
class Target:
    """A server, a model there, and the shape of the requests."""

    root: str
    headers: dict[str, str]
    model: str
    prompt_tokens: int
    output_tokens: int
    ignore_eos: bool = True

    def body(self, prompt: str, output_tokens: int, stream: bool) -> dict[str, object]:
        """One request. Greedy, so that a server's speed does not hang on its sampler."""
        body: dict[str, object] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": stream,
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if stream:
            body["stream_options"] = {"include_usage": True}
        return body


@dataclass(frozen=True)
class Level:
    """What a number of clients saw together."""

    clients: int
    seconds: float
    answers: Sequence[Answer]
    failures: Sequence[str]

    def summary(self) -> dict[str, object]:
        """Numbers as JSON: seconds throughout, percentiles by name."""
        completion = sum(answer.completion_tokens for answer in self.answers)
        first = [answer.first_token_seconds for answer in self.answers]
        return {
            "clients": self.clients,
            "requests": len(self.answers) + len(self.failures),
            "failures": len(self.failures),
            "seconds": round(self.seconds, 4),
            "prompt_tokens": self._used("prompt_tokens"),
            "cached_tokens": sum(
                (answer.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                for answer in self.answers
            ),
            "completion_tokens": completion,
            "gpu_seconds": self._used("gpu_seconds"),
            "output_tokens_per_second": round(completion / self.seconds, 2),
            "time_to_first_token": percentiles([value for value in first if value is not None]),
            "time_between_tokens": percentiles([g for answer in self.answers for g in answer.gaps]),
            "request_seconds": percentiles([a.ended - a.began for a in self.answers]),
        }

    def _used(self, key: str) -> float:
        return round(sum(answer.usage.get(key) or 0 for answer in self.answers), 6)


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95 and p99 of `values`, linearly interpolated; None when there are none."""
    if not values:
        return None
    found = np.percentile(values, PERCENTILES)
    return {
        f"p{rank}": round(float(value), 6) for rank, value in zip(PERCENTILES, found, strict=True)
    }


class Prompts:
    """Prompts of random words: all different from their first words on, so that none is cached."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.words = 1

    def draw(self, words: int | None = None) -> str:
        """A new prompt of `words` words, or of as many as calibrated."""
        return " ".join(self._random.choices(WORDS, k=words or self.words))

    async def calibrate(self, client: httpx.AsyncClient, target: Target) -> None:
        """Finds by two requests how many words make the wanted number of tokens."""
        few, many = 8, 72
        low = await _count(client, target, self.draw(few))
        high = await _count(client, target, self.draw(many))
        per_word = max((high - low) / (many - few), 0.01)
        self.words = max(1, round(few + (target.prompt_tokens - low) / per_word))


async def _count(client: httpx.AsyncClient, target: Target, prompt: str) -> int:
    response = await client.post(
        f"{target.root}/chat/completions", json=target.body(prompt, 1, stream=False)
    )
    if response.status_code != 200:
        raise AnswerFailed(_refusal(response.status_code, response.content))
    return int(response.json()["usage"]["prompt_tokens"])


async def run_level(target: Target, prompts: Prompts, clients: int, requests: int) -> Level:
    """`clients` clients, each of which sends `requests` requests one after the other."""
    answers: list[Answer] = []
    failures: list[str] = []

    async def one_client() -> None:
        # A connection pool each, as separate clients would have.
        async with open_client(target) as client:
            for _ in range(requests):
                try:
                    answers.append(await _ask(client, target, prompts.draw()))
                except (AnswerFailed, httpx.HTTPError) as error:
                    failures.append(f"{type(error).__name__}: {error}")

    began = time.perf_counter()
    await asyncio.gather(*(one_client() for _ in range(clients)))
    return Level(clients, time.perf_counter() - began, answers, failures)


def open_client(target: Target) -> httpx.AsyncClient:
    """A client of the target's server."""
    return httpx.AsyncClient(headers=target.headers, timeout=TIMEOUT, trust_env=False)


async def _ask(client: httpx.AsyncClient, target: Target, prompt: str) -> Answer:
    body = target.body(prompt, target.output_tokens, stream=True)
    answer = Answer(began=time.perf_counter())
    async with client.stream("POST", f"{target.root}/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise AnswerFailed(_refusal(response.status_code, await response.aread()))
        async for piece in response.aiter_raw():
            answer.push(piece, time.perf_counter())
    if not answer.complete:
        raise AnswerFailed("the stream ended without [DONE]")
    return answer


def _refusal(status: int, body: bytes) -> str:
    try:
        message = error_message(httpx.Response(status, content=body).json())
    except ValueError:
        message = body[:200].decode("utf-8", "replace")
    return f"HTTP {status}: {message}"
