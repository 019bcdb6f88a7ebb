"""Plays scripts as the clients of an OpenAI-compatible server, in a separate process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from bench.play import Answer, Request, Script
from trivium.cli import answer as stream
from trivium.cli.http_stream import Pieces, read_answer
from trivium.cli.load import Client, Target

try:
    from uvloop import new_event_loop
except ImportError:  # fall back to asyncio's own
    from asyncio import new_event_loop  # type: ignore[assignment]

_LOOK_SECONDS = 0.002  # interval for checking whether to send the late request


class LoadClient:
    """Plays scripts. Each client has its own connection, opened with its first request."""

    def play(self, target: Target, script: Script) -> tuple[list[Answer], float]:
        """The answers, and the CPU seconds spent on getting them."""
        run = _Run(target, script)
        with asyncio.Runner(loop_factory=new_event_loop) as loop:
            began = time.process_time()
            loop.run(run.play())
            spent = time.process_time() - began
        return [to_answer(sent_at, pieces) for sent_at, pieces in run.records()], spent


def to_answer(sent_at: float, pieces: Pieces) -> Answer:
    """Parses a stream with its timings. Never raises: errors go into the answer's `fault`."""
    try:
        read = read_answer(sent_at, pieces)
    except stream.AnswerFailed as failed:
        return Answer(sent_at, pieces[-1][0] if pieces else sent_at, (), fault=str(failed))
    # A choice of nothing but control tokens has no text; use the time of its finish_reason.
    choices = tuple(
        tuple(read.parts.get(index, (end,))) for index, end in sorted(read.ends.items())
    )
    if not choices:
        return Answer(
            sent_at, read.ended, (), fault="the stream ended before the answer was complete"
        )
    return Answer(
        sent_at,
        read.ended,
        choices,
        prompt_tokens=read.usage.get("prompt_tokens") or 0,
        completion_tokens=read.completion_tokens,
        cached_tokens=(read.usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        device_seconds=read.usage.get("gpu_seconds"),
        text=read.text,
    )


def _body(target: Target, request: Request) -> dict[str, object]:
    body = target.body(request.messages, request.output, request.n)
    return {**body, "temperature": request.temperature, "top_p": request.top_p}


class _Run:
    def __init__(self, target: Target, script: Script) -> None:
        def encoded(requests: list[tuple[int, Request]]) -> list[tuple[int, bytes]]:
            return [(place, target.request(_body(target, request))) for place, request in requests]

        clients, late = script.numbered()
        self._clients = [(Client(target), encoded(requests)) for requests in clients]
        self._late = (Client(target), encoded([late] if late else []))
        self._late_after = script.late_after
        self._records: dict[int, tuple[float, Pieces]] = {}

    def records(self) -> list[tuple[float, Pieces]]:
        """When each request was sent, and its response; in the order of the script."""
        return [self._records[place] for place in sorted(self._records)]

    async def play(self) -> None:
        clients = [asyncio.create_task(self._play(*each)) for each in self._clients]
        if self._late[1]:
            await self._until_late(lambda: all(task.done() for task in clients))
            await self._play(*self._late)
        await asyncio.gather(*clients)

    async def _until_late(self, are_done: Callable[[], bool]) -> None:
        """Returns once every client has received enough pieces, or all have finished."""
        while not are_done():
            if all(len(client.pieces) > self._late_after for client, _ in self._clients):
                return
            await asyncio.sleep(_LOOK_SECONDS)

    async def _play(self, client: Client, requests: list[tuple[int, bytes]]) -> None:
        for place, request in requests:
            sent_at = time.perf_counter()
            try:
                pieces: Pieces = await client.send(request)
            except OSError:  # an empty response counts as a fault
                pieces = ()
            self._records[place] = sent_at, pieces
        client.close()
