"""Clients of an OpenAI-compatible server, in a process of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from bench.http_stream import Connection, Pieces, read_answer
from bench.play import Answer, Ask, Script

try:
    from uvloop import new_event_loop
except ImportError:  # where there is none, asyncio's own
    from asyncio import new_event_loop  # type: ignore[assignment]

ANSWER_SECONDS = 900.0
_LOOK_SECONDS = 0.002  # how often it is looked whether a late request's time has come


@dataclass(frozen=True)
class Server:
    """`root` is the URL that ends in /v1; `api_key` may be empty."""

    root: str
    model: str
    api_key: str = ""

    def request(self, ask: Ask) -> bytes:
        """A request of a stream, as it is sent."""
        body: dict[str, object] = {
            "model": self.model,
            "messages": list(ask.messages),
            "max_tokens": ask.output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if ask.n > 1:
            body["n"] = ask.n
        content = json.dumps(body).encode()
        parts = urlsplit(self.root)
        lines = [
            f"POST {parts.path}/chat/completions HTTP/1.1",
            f"Host: {parts.netloc}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            f"Content-Length: {len(content)}",
        ]
        if self.api_key:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join([*lines, "", ""]).encode() + content


class LoadClient:
    """Plays scripts. Each client has a connection of its own, opened with its first request."""

    def play(self, server: Server, script: Script) -> tuple[list[Answer], float]:
        """The answers, and the processor seconds that it took to get them."""
        run = _Run(server, script)
        with asyncio.Runner(loop_factory=new_event_loop) as loop:
            began = time.process_time()
            loop.run(run.play())
            spent = time.process_time() - began
        return [read_answer(asked, pieces) for asked, pieces in run.records()], spent


class _Run:
    def __init__(self, server: Server, script: Script) -> None:
        clients, late = script.numbered()
        address = urlsplit(server.root)
        if address.scheme != "http" or address.hostname is None:
            raise ValueError(f"{server.root}: only http:// addresses can be measured")
        self._address = address.hostname, address.port or 80
        self._clients = [[(place, server.request(ask)) for place, ask in asks] for asks in clients]
        self._late = [(late[0], server.request(late[1]))] if late else []
        self._late_after = script.late_after
        self._open: list[Connection] = []
        self._records: dict[int, tuple[float, Pieces]] = {}

    def records(self) -> list[tuple[float, Pieces]]:
        """When each request was sent, and what came; in the order of the script."""
        return [self._records[place] for place in sorted(self._records)]

    async def play(self) -> None:
        clients = [asyncio.create_task(self._client(asks)) for asks in self._clients]
        if self._late:
            await self._until_late(lambda: all(task.done() for task in clients))
            await self._client(self._late)
        await asyncio.gather(*clients)

    async def _until_late(self, are_done: Callable[[], bool]) -> None:
        """Returns when every client has had enough pieces, or all have ended without."""
        while not are_done():
            enough = [len(each.pieces) > self._late_after for each in self._open]
            if len(enough) == len(self._clients) and all(enough):
                return
            await asyncio.sleep(_LOOK_SECONDS)

    async def _client(self, asks: list[tuple[int, bytes]]) -> None:
        connection: Connection | None = None
        for place, request in asks:
            asked = time.perf_counter()
            pieces: Pieces = ()
            with contextlib.suppress(OSError, TimeoutError):  # an answer without bytes tells
                async with asyncio.timeout(ANSWER_SECONDS):
                    if connection is not None and connection.is_open:
                        pieces = await connection.ask(request)
                    if not pieces:  # a kept connection may be closed while a request is sent
                        connection = await self._connect()
                        pieces = await connection.ask(request)
            self._records[place] = asked, pieces
        if connection is not None:
            connection.close()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, *self._address)
        self._open.append(connection)
        return connection
