"""The facade's usage records, for requests that ended before an answer began."""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.rest_facade.conftest import StartFacade
from tests.rest_facade.scripted_backend import MODEL, ScriptedBackend, delta, header
from trivium.wire.errors import ServiceError

URL = "/v1/chat/completions"
REQUEST = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
KEY = {"authorization": "Bearer one"}


def records(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (folder / "rest_facade.usage.jsonl").read_text().splitlines()
    ]


@pytest.fixture
async def client(start_facade: StartFacade, tmp_path: Path) -> httpx.AsyncClient:
    """A client for a facade that requires the key `one`, named alice."""
    keys = tmp_path / "keys"
    keys.write_text(f"{hashlib.sha256(b'one').hexdigest()} alice\n")
    started: httpx.AsyncClient = await start_facade(api_keys_file=keys, usage_log=str(tmp_path))
    return started


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refused_request_has_an_empty_record(
    client: httpx.AsyncClient, backend: ScriptedBackend, tmp_path: Path, stream: bool
) -> None:
    """The record has no tokens, no device time, and the client's HTTP status."""
    ask = REQUEST | {"stream": stream}
    backend.script = [ServiceError("queue_full", "Full.")]
    await client.post(URL, json=ask, headers=KEY | {"x-request-id": "req_full"})
    await client.post(URL, json=ask | {"top_p": 7}, headers=KEY)
    await client.post(URL, json=ask)
    full, invalid, stranger = records(tmp_path)

    nothing = {
        "event": "usage",
        "service": "rest_facade",
        "prompt_tokens": 0,
        "cached_tokens": 0,
        "completion_tokens": 0,
        "reasoning_tokens": 0,
        "gpu_seconds": 0,
        "device_nanoseconds": 0,
        "finish_reason": "error",
    }
    for record in (full, invalid, stranger):
        assert nothing == {name: record[name] for name in nothing}
    assert ("alice", MODEL, 429) == (full["key"], full["model"], full["status"])
    assert "req_full" == full["request_id"]
    assert ("alice", 400) == (invalid["key"], invalid["status"])
    assert ("", 401) == (stranger["key"], stranger["status"])


async def test_answered_requests_are_recorded_by_the_generator(
    client: httpx.AsyncClient, backend: ScriptedBackend, tmp_path: Path
) -> None:
    """Complete, streamed or interrupted, the generator records it, and is given the key's name."""
    await client.post(URL, json=REQUEST, headers=KEY)
    await client.post(URL, json=REQUEST | {"stream": True}, headers=KEY)
    backend.script = [header(), delta("Hello"), ServiceError("internal_error", "Oh.")]
    await client.post(URL, json=REQUEST | {"stream": True}, headers=KEY)

    assert [] == records(tmp_path)
    assert ["alice"] * 3 == [metadata["x-trivium-key-name"] for metadata in backend.metadata]


async def test_a_client_that_disconnects_before_its_answer_has_a_record(
    client: httpx.AsyncClient, backend: ScriptedBackend, tmp_path: Path
) -> None:
    """The status is 499: the facade cannot know whether a generator had started."""
    backend.script = [None]
    asking = asyncio.create_task(client.post(URL, json=REQUEST, headers=KEY))
    await backend.started.wait()
    asking.cancel()
    await backend.cancelled.wait()
    async with asyncio.timeout(30):
        while not records(tmp_path):  # noqa: ASYNC110 - no event for a new line
            await asyncio.sleep(0.01)
    [record] = records(tmp_path)

    assert (499, "abort", 0) == (
        record["status"],
        record["finish_reason"],
        record["device_nanoseconds"],
    )


@pytest.mark.parametrize(("leaves", "status"), [(False, 429), (True, 499)])
async def test_a_stream_that_fails_after_its_headers_has_a_record(
    start_facade: StartFacade,
    backend: ScriptedBackend,
    tmp_path: Path,
    leaves: bool,
    status: int,
) -> None:
    """Its headers were sent while it waited; the record has what became of it."""
    client = await start_facade(keep_alive_seconds=0.02, usage_log=str(tmp_path))
    go_on = asyncio.Event()
    backend.script = [go_on, ServiceError("queue_full", "Full.")]
    async with client.stream("POST", URL, json=REQUEST | {"stream": True}) as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        if not leaves:
            go_on.set()
            async for _ in lines:
                pass
    async with asyncio.timeout(30):
        while not records(tmp_path):  # noqa: ASYNC110 - no event for a new line
            await asyncio.sleep(0.01)
    [record] = records(tmp_path)

    assert (200, status) == (answer.status_code, record["status"])


async def test_only_completions_are_recorded(client: httpx.AsyncClient, tmp_path: Path) -> None:
    """Other requests take no device time."""
    await client.get("/v1/models", headers=KEY)
    await client.get("/v1/models")
    await client.get("/v1/nowhere", headers=KEY)
    await client.get("/health")

    assert [] == records(tmp_path)


async def test_clients_cannot_choose_the_key_name(
    start_facade: StartFacade, backend: ScriptedBackend
) -> None:
    """Without keys, calls have no key name."""
    client: httpx.AsyncClient = await start_facade()
    await client.post(URL, json=REQUEST, headers={"x-trivium-key-name": "mallory"})

    assert "x-trivium-key-name" not in backend.metadata[0]
