"""When the next stage is overloaded, callers get its refusal."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from rest_facade.backend import Backend
from rest_facade.convert import chat
from tests.rest_facade.scripted_backend import MODEL, ScriptedBackend
from trivium.chat.v1 import chat_pb2
from trivium.wire.errors import ServiceError

CALLS = 3_000


def request() -> chat.Request:
    message = chat_pb2.ChatMessage(
        role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text="Hi")]
    )
    return chat.Request(model=MODEL, messages=[message])


async def whole(backend: Backend) -> None:
    await backend.complete_chat(request())


async def streamed(backend: Backend) -> None:
    stream = backend.stream_chat(request())
    try:
        await stream.read()
    finally:
        stream.close()


@pytest.mark.parametrize("ask", [whole, streamed])
async def test_every_refusal_of_a_burst_arrives(
    backend: ScriptedBackend, ask: Callable[[Backend], Awaitable[None]]
) -> None:
    """However many calls arrive before the first is accepted, none is reset instead."""
    backend.script = [ServiceError("queue_full", "Full.", retry_after=7)]
    heard: Counter[tuple[str, float | None]] = Counter()
    async with Backend(f"127.0.0.1:{backend.port}") as client:

        async def one() -> None:
            try:
                await ask(client)
            except ServiceError as error:
                heard[error.code, error.retry_after] += 1

        await asyncio.gather(*(one() for _ in range(CALLS)))

    assert {("queue_full", 7): CALLS} == heard
