"""Thousands of simultaneous requests: each is answered, or told when to retry."""

import asyncio
import json
import resource
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.pipeline.services import Services

pytestmark = pytest.mark.slow

REQUESTS = 2_000


@dataclass(frozen=True)
class Reply:
    """A complete HTTP response."""

    status: int
    headers: dict[str, str]
    body: str


@pytest.fixture(autouse=True)
def many_sockets() -> Iterator[None]:
    """This process holds the other end of every connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def ask(port: int, body: bytes, connected: asyncio.Barrier) -> Reply:
    """Sends the request once all others are connected too."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await connected.wait()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    answer = (await reader.read()).decode()
    writer.close()
    lines, _, content = answer.partition("\r\n\r\n")
    first, *rest = lines.split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in rest)
    return Reply(int(first.split()[1]), headers, content)


async def burst(services: Services) -> list[tuple[bool, Reply]]:
    """For each request, whether it was streaming, and its reply."""
    connected = asyncio.Barrier(REQUESTS)

    async def one(number: int) -> tuple[bool, Reply]:
        stream = bool(number % 2)
        body = {
            "model": services.model,
            "messages": [{"role": "user", "content": f"Tell me of {number}."}],
            "max_tokens": 20,
            "stream": stream,
            # A stop string keeps the generator call open for further commands.
            "stop": ["never said"] if number % 4 < 2 else None,
        }
        return stream, await ask(services.pipeline.port, json.dumps(body).encode(), connected)

    return await asyncio.gather(*map(one, range(REQUESTS)))


def test_each_of_2000_concurrent_requests_is_answered_or_gets_retry_after(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Requests that are not answered get 429 queue_full with Retry-After, streaming or not."""
    settings = {"TRIVIUM_GENERATOR_SLOTS": 4, "TRIVIUM_GENERATOR_MAX_QUEUED_REQUESTS": 16}
    with Services(tiny_model, tmp_path, **settings) as services:
        replies = asyncio.run(burst(services))
        metrics = services.wait_until_idle()

    counts = Counter(reply.status for _, reply in replies)
    assert {200, 429} == set(counts), counts
    for stream, reply in replies:
        if reply.status == 200:
            assert ("[DONE]" if stream else '"finish_reason"') in reply.body
        else:
            assert "queue_full" == json.loads(reply.body)["error"]["code"]
            assert 1 <= int(reply.headers["retry-after"]) <= 60
    requests = metrics.get("trivium_device_request_nanoseconds_total", 0)
    overhead = metrics["trivium_device_overhead_nanoseconds_total"]
    assert metrics["trivium_device_busy_nanoseconds_total"] == requests + overhead
