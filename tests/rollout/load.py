"""A few clients behind a load balancer that record the outcome of each request."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

MAX_REQUESTS = 4000


@dataclass(frozen=True)
class Outcome:
    """A request's outcome. `begun`: part of a stream had arrived; `fault`: empty if complete."""

    streamed: bool
    begun: bool
    fault: str


@dataclass
class LoadBalancer:
    """Sends requests round-robin to the `urls` whose /health is 200, and to the next if a
    connection is refused. `health` has all results by URL."""

    urls: list[str]
    health: dict[str, list[str]] = field(default_factory=dict)
    _ready: set[str] = field(default_factory=set)
    _turns: Any = field(default_factory=itertools.count)

    async def look(self, client: httpx.AsyncClient) -> None:
        """Checks all of them once."""
        for url in self.urls:
            try:
                answer = await client.get(f"{url}/health")
                said = "ready" if answer.status_code == 200 else answer.json()["error"]["code"]
            except httpx.TransportError:
                said = "unreachable"
            self.health.setdefault(url, []).append(said)
            (self._ready.add if said == "ready" else self._ready.discard)(url)

    @contextlib.asynccontextmanager
    async def send(
        self, client: httpx.AsyncClient, body: dict[str, Any]
    ) -> AsyncIterator[httpx.Response]:
        """The response of one of them."""
        ready = sorted(self._ready)
        turn = next(self._turns)
        for attempt in range(len(ready)):
            url = ready[(turn + attempt) % len(ready)]
            request = client.build_request("POST", f"{url}/v1/chat/completions", json=body)
            try:
                response = await client.send(request, stream=True)
            except httpx.ConnectError:
                continue
            try:
                yield response
            finally:
                await response.aclose()
            return
        raise httpx.ConnectError("no facade is ready")


@dataclass
class Load:
    """The outcomes of the requests so far."""

    balancer: LoadBalancer
    streams: int  # concurrent ones
    outcomes: list[Outcome] = field(default_factory=list)
    _noted: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def faults(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.fault]

    async def more(self, count: int) -> None:
        """Returns after `count` more requests."""
        wanted = len(self.outcomes) + count
        async with asyncio.timeout(120):
            while len(self.outcomes) < wanted:
                self._noted.clear()
                await self._noted.wait()

    def note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._noted.set()


@contextlib.asynccontextmanager
async def loaded(
    model: str, urls: list[str], clients: int = 4, system: str = ""
) -> AsyncIterator[Load]:
    """Sends requests, half of them streaming, while the context lasts; all are complete at its end.

    With a `system` message each is a new conversation; without one they are all alike.
    """
    load = Load(LoadBalancer(urls), clients // 2)
    numbers = itertools.count()
    leaving = asyncio.Event()
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        await load.balancer.look(client)

        async def look() -> None:
            while not leaving.is_set():
                await load.balancer.look(client)
                await asyncio.sleep(0.1)

        async def ask(streamed: bool) -> None:
            while not leaving.is_set() and len(load.outcomes) < MAX_REQUESTS:
                messages = [{"role": "user", "content": "Once upon a time"}]
                if system:
                    messages[0]["content"] += f" there was {next(numbers)}"
                    messages.insert(0, {"role": "system", "content": system})
                load.note(await _outcome(load.balancer, client, model, messages, streamed))
                await asyncio.sleep(0.01)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(look())
            for number in range(clients):
                tasks.create_task(ask(number % 2 == 0))
            try:
                yield load
            finally:
                leaving.set()


async def _outcome(
    balancer: LoadBalancer,
    client: httpx.AsyncClient,
    model: str,
    messages: list[dict[str, str]],
    streamed: bool,
) -> Outcome:
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": 40,
        "ignore_eos": True,
        "stream": streamed,
    }
    begun, text = False, ""
    try:
        async with balancer.send(client, body) as response:
            async for part in response.aiter_text():
                begun, text = begun or (streamed and response.status_code == 200), text + part
    except httpx.TransportError as error:
        return Outcome(streamed, begun, repr(error))
    end = "data: [DONE]\n\n" if streamed else "}"
    whole = response.status_code == 200 and text.endswith(end)
    return Outcome(streamed, begun, "" if whole else f"{response.status_code} {text[-300:]}")
