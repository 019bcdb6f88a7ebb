"""Connections that end early, stay silent for long, or have no next stage."""

import asyncio
import contextlib
import importlib.metadata
import json
import socket

import httpx
import pytest

from tests.rest_facade.conftest import StartFacade
from tests.rest_facade.scripted_backend import (
    HELLO,
    MODEL,
    ScriptedBackend,
    delta,
    header,
    usage,
)
from trivium.wire.errors import ServiceError

REQUEST = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
URL = "/v1/chat/completions"
LONG = [delta("x" * 1_000_000) for _ in range(5)]  # more than the kernel buffers


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_disconnects_before_its_answer(
    client: httpx.AsyncClient, backend: ScriptedBackend, stream: bool
) -> None:
    """A client that disconnects before its answer begins cancels the call behind it."""
    backend.script = (None,)
    asking = asyncio.create_task(client.post(URL, json=REQUEST | {"stream": stream}))
    await backend.started.wait()
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking

    await backend.cancelled.wait()
    metrics = (await client.get("/metrics")).text
    assert "trivium_http_disconnects_total 1.0" in metrics
    assert f'trivium_http_requests_total{{route="{URL}",status="499"}} 1.0' in metrics


async def test_a_client_that_disconnects_mid_stream(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """A client that disconnects while its stream is silent cancels the call behind it."""
    backend.script = (header(), delta("He"), None)
    async with client.stream("POST", URL, json=REQUEST | {"stream": True}) as answer:
        async for line in answer.aiter_lines():
            if "He" in line:
                break

    await backend.cancelled.wait()
    metrics = (await client.get("/metrics")).text
    assert "trivium_http_requests_running 0.0" in metrics


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_disconnects_with_pipelined_requests(
    client: httpx.AsyncClient, backend: ScriptedBackend, stream: bool
) -> None:
    """The request that is being answered is cancelled, and those that wait are never begun."""
    backend.script = (header(), delta("He"), None) if stream else (None,)
    body = json.dumps(REQUEST | {"stream": stream})
    head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    _, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    writer.write(request * 3)
    await backend.started.wait()
    writer.close()

    async with asyncio.timeout(5):
        await backend.cancelled.wait()
    assert 1 == len(backend.requests)


async def test_keep_alives(start_facade: StartFacade, backend: ScriptedBackend) -> None:
    """A silent stream sends comments, which clients ignore."""
    client = await start_facade(keep_alive_seconds=0.02)
    go_on = asyncio.Event()
    backend.script = (header(), delta("He"), go_on, delta(finish="STOP"), usage())
    events = []
    async with client.stream("POST", URL, json=REQUEST | {"stream": True}) as answer:
        lines = answer.aiter_lines()
        while "He" not in await anext(lines):  # on a slow machine comments come before it, too
            pass
        async for line in lines:
            events.append(line)
            if events.count(": keep-alive") == 3:
                go_on.set()

    assert ["", ": keep-alive", ""] == events[:3]
    assert events[-2] == "data: [DONE]"


async def test_status_waits_for_the_first_event(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """No HTTP status is sent before the next stage's first event."""
    go_on = asyncio.Event()
    backend.script = (go_on, *HELLO)
    asking = asyncio.create_task(client.post(URL, json=REQUEST | {"stream": True}))
    await backend.started.wait()
    waiting = not asking.done()
    go_on.set()

    assert waiting
    assert (await asking).status_code == 200


async def test_keep_alives_before_the_first_event(
    start_facade: StartFacade, backend: ScriptedBackend
) -> None:
    """If the next stage's first event takes long, headers and comments are sent before it."""
    client = await start_facade(keep_alive_seconds=0.02)
    go_on = asyncio.Event()
    backend.script = (go_on, *HELLO)
    lines = []
    async with client.stream("POST", URL, json=REQUEST | {"stream": True}) as answer:
        async for line in answer.aiter_lines():
            lines.append(line)
            if lines.count(": keep-alive") == 3:
                go_on.set()

    assert (200, ": keep-alive") == (answer.status_code, lines[0])
    assert lines[-2] == "data: [DONE]"


async def test_an_error_after_keep_alives(
    start_facade: StartFacade, backend: ScriptedBackend
) -> None:
    """The error is the last event of a stream that has begun."""
    client = await start_facade(keep_alive_seconds=0.02)
    go_on = asyncio.Event()
    backend.script = (go_on, ServiceError("queue_full", "Come again."))
    lines = []
    async with client.stream("POST", URL, json=REQUEST | {"stream": True}) as answer:
        async for line in answer.aiter_lines():
            lines.append(line)
            go_on.set()

    assert 200 == answer.status_code
    assert "queue_full" in lines[-2]
    metrics = (await client.get("/metrics")).text
    assert 'trivium_http_stream_errors_total{code="queue_full"} 1.0' in metrics


@pytest.mark.parametrize("beginning", ["", "POST /v1/chat/comp"])
async def test_an_incomplete_request_head_times_out(
    start_facade: StartFacade, beginning: str
) -> None:
    """The connection is closed whether nothing comes or only a byte now and then."""
    client = await start_facade(idle_connection_seconds=1)
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    writer.write(beginning.encode())
    await closed(reader, writer, b"l" if beginning else b"")
    writer.close()


async def closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, more: bytes) -> None:
    """Sends `more` now and then until the server has closed the connection."""
    async with asyncio.timeout(30):
        while not reader.at_eof():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.2)
            if not reader.at_eof():
                writer.write(more)


HEALTH = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"


async def status(reader: asyncio.StreamReader) -> int:
    """The status of the next answer, whose body is read too."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r")[0]))
    return int(head.split()[1])


@pytest.mark.parametrize(
    ("request_", "rest"),
    [
        (HEALTH, b"\r\n"),
        (HEALTH.replace(b"\r\n\r\n", b"\r\nContent-Length: 1000\r\n\r\n"), b"a"),
        (HEALTH + b"GET /", b"a"),
    ],
    ids=["blank lines", "the rest of a body", "a second request"],
)
async def test_an_incomplete_request_times_out_after_an_answer(
    start_facade: StartFacade, request_: bytes, rest: bytes
) -> None:
    """Whatever a client sends now and then, the connection is closed unless a head is complete."""
    client = await start_facade(idle_connection_seconds=1)
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    writer.write(request_)
    assert 200 == await status(reader)
    async with asyncio.timeout(10):
        while not reader.at_eof():
            writer.write(rest)
            with contextlib.suppress(TimeoutError, ConnectionError):
                await asyncio.wait_for(reader.read(1), 0.2)
    writer.close()


@pytest.mark.slow
async def test_the_idle_timeout_begins_anew(start_facade: StartFacade) -> None:
    """With each answer, and with the beginning of each request."""
    client = await start_facade(idle_connection_seconds=2)
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    statuses = []
    for _ in range(2):
        writer.write(HEALTH[:5])
        await asyncio.sleep(1.2)
        writer.write(HEALTH[5:])
        statuses.append(await status(reader))
        await asyncio.sleep(1.2)
    writer.close()

    assert [200, 200] == statuses


async def test_a_request_that_began_before_the_last_answer(
    start_facade: StartFacade, backend: ScriptedBackend
) -> None:
    """Its own answer may take longer than the idle timeout, which began with the last one."""
    client = await start_facade(idle_connection_seconds=2)
    go_on = asyncio.Event()
    backend.script = (header(), go_on, *HELLO[1:])
    body = json.dumps(REQUEST)
    head = f"POST {URL} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    writer.write(HEALTH + head.encode())
    first = await status(reader)
    writer.write(f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
    await asyncio.sleep(2.5)
    go_on.set()

    assert [200, 200] == [first, await status(reader)]
    writer.close()


LARGEST_HEADER = 64 * 1024 - len("/health/live") - len("x")


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ("x: y\r\n" * 100, 200),
        ("x: y\r\n" * 101, 400),
        (f"x: {'y' * LARGEST_HEADER}\r\n", 200),
        (f"x: {'y' * LARGEST_HEADER}y\r\n", 400),
    ],
    ids=["most", "too many", "largest", "too large"],
)
async def test_limits_of_heads_are_inclusive(
    client: httpx.AsyncClient, headers: str, expected: int
) -> None:
    """A hundred headers and 64 KiB are accepted, and the next request too."""
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    for _ in range(2 if expected == 200 else 1):
        writer.write(f"GET /health/live HTTP/1.1\r\n{headers}\r\n".encode())
        assert expected == await status(reader)
    writer.close()


async def test_a_long_answer_outlasts_the_idle_timeout(
    start_facade: StartFacade, backend: ScriptedBackend
) -> None:
    """This holds even if the next request begins in the meantime; its head times out after it."""
    client = await start_facade(idle_connection_seconds=1)
    go_on = asyncio.Event()
    backend.script = (header(), delta("He"), go_on, delta(finish="STOP"), usage())
    reader, writer = await ask_for_a_stream(client)
    writer.write(b"POST /v1")
    await asyncio.sleep(1.5)
    go_on.set()

    assert b"data: [DONE]" in await reader.readuntil(b"[DONE]")
    await closed(reader, writer, b"l")
    writer.close()


async def test_a_client_that_stops_reading(
    start_facade: StartFacade, backend: ScriptedBackend
) -> None:
    """It is disconnected once it has read nothing for as long as an idle connection is kept."""
    client = await start_facade(idle_connection_seconds=1)
    backend.script = (header(), *LONG, None)
    reader, writer = await ask_for_a_stream(client)
    await reader.readuntil(b"data: ")
    async with asyncio.timeout(30):
        await backend.cancelled.wait()

    metrics = (await client.get("/metrics")).text
    assert "trivium_http_requests_running 0.0" in metrics
    assert "trivium_http_disconnects_total 1.0" in metrics
    writer.close()


async def test_a_client_that_reads_slowly(
    start_facade: StartFacade, backend: ScriptedBackend
) -> None:
    """It gets the whole stream, even if each event takes longer than a connection may be idle."""
    client = await start_facade(idle_connection_seconds=1)
    backend.script = (header(), *LONG, delta(finish="STOP"), usage())
    reader, writer = await ask_for_a_stream(client)
    answer = b""
    async with asyncio.timeout(60):
        while not answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            answer += await reader.read(2**18)
            await asyncio.sleep(0.3)

    assert 5_000_000 < len(answer)
    writer.close()


async def ask_for_a_stream(
    client: httpx.AsyncClient,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that has asked for a stream, and buffers little of it."""
    body = json.dumps(REQUEST | {"stream": True})
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
    plain.connect((client.base_url.host, client.base_url.port))
    reader, writer = await asyncio.open_connection(sock=plain, limit=2**18)
    head = f"POST {URL} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return reader, writer


async def unready(client: httpx.AsyncClient) -> httpx.Response:
    """The first unsuccessful /health, after the gap that replacing a replica would leave."""
    while (answer := await client.get("/health")).status_code == 200:
        pass
    return answer


async def test_the_next_stage_goes_away_and_comes_back(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """Without the next stage everything but liveness is 503; once it is back, requests succeed."""
    await backend.die()
    ready = await unready(client)
    asked = await client.post(URL, json=REQUEST)
    models = await client.get("/v1/models")
    live = await client.get("/health/live")

    assert [503, 503, 503, 200] == [a.status_code for a in (ready, asked, models, live)]
    assert ready.json()["error"]["code"] == "backend_unavailable"
    assert asked.headers["retry-after"] == "1"
    await backend.start()
    while (await client.get("/health")).status_code != 200:
        pass
    assert (await client.post(URL, json=REQUEST)).status_code == 200


async def test_the_next_stage_dies_mid_stream(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """A stream whose next stage dies ends with an error event, without [DONE]."""
    backend.script = (header(), delta("He"), None)
    text = ""
    async with client.stream("POST", URL, json=REQUEST | {"stream": True}) as answer:
        async for part in answer.aiter_text():
            text += part
            if "He" in part:
                await backend.die()

    assert '"code":"backend_unavailable"' in text.split("\n\n")[-2]
    assert "[DONE]" not in text


async def test_readiness(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """/health follows the next stage's readiness; if not ready, it is 503 with Retry-After."""
    ready = await client.get("/health")
    backend.set_serving(False)
    loading = await unready(client)

    assert (ready.status_code, ready.json()) == (
        200,
        {"status": "ok", "version": importlib.metadata.version("trivium")},
    )
    assert loading.status_code == 503
    assert loading.json()["error"]["code"] == "model_loading"
    assert 1 <= int(loading.headers["retry-after"]) <= 60


async def test_metrics(client: httpx.AsyncClient) -> None:
    """/metrics counts requests by route and status, and times first tokens."""
    await client.post(URL, json=REQUEST | {"stream": True})
    await client.post(URL, json=[])
    await client.get("/v1/models/org/other")
    await client.get("/somewhere/else")
    text = (await client.get("/metrics")).text

    assert f'trivium_http_requests_total{{route="{URL}",status="200"}} 1.0' in text
    assert f'trivium_http_requests_total{{route="{URL}",status="400"}} 1.0' in text
    assert 'trivium_http_requests_total{route="/v1/models/{id}",status="200"} 1.0' in text
    assert 'trivium_http_requests_total{route="other",status="404"} 1.0' in text
    assert 'trivium_http_rejections_total{code="invalid_type"} 1.0' in text
    assert 'trivium_http_rejections_total{code="queue_full"} 0.0' in text
    assert "trivium_http_time_to_first_token_seconds_count 1.0" in text


async def test_metrics_by_replica(
    start_facade: StartFacade, backend: ScriptedBackend, client: httpx.AsyncClient
) -> None:
    """/metrics has the state of each tokenizer and the calls it was picked for."""
    backend.script = (header(), delta("He"), None)
    labels = f'model_name="",replica="127.0.0.1:{backend.port}"'
    async with client.stream("POST", URL, json=REQUEST | {"stream": True}) as answer:
        parts = answer.aiter_text()
        await anext(parts)
        during = (await client.get("/metrics")).text
    await backend.die()
    async with asyncio.timeout(30):
        while f'state{{{labels},state="unreachable"}} 1.0' not in (
            after := (await client.get("/metrics")).text
        ):
            pass

    assert f"trivium_replica_picked_total{{{labels}}} 1.0" in during
    assert f"trivium_replica_outstanding{{{labels}}} 1.0" in during
    assert f'trivium_replica_state{{{labels},state="serving"}} 1.0' in during
    assert f'trivium_replica_state{{{labels},state="unreachable"}} 0.0' in during
    assert f"trivium_replica_outstanding{{{labels}}} 0.0" in after
    assert f'trivium_replica_state{{{labels},state="serving"}} 0.0' in after


async def test_metrics_of_retries(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """/metrics counts retried calls by reason, including reasons that have not occurred."""
    backend.script = [ServiceError("draining", "Not here.")]
    refused = await client.post(URL, json=REQUEST)
    text = (await client.get("/metrics")).text

    name = "trivium_replica_retries_total"
    assert (503, "draining") == (refused.status_code, refused.json()["error"]["code"])
    assert f'{name}{{model_name="",reason="draining"}} 1.0' in text
    assert f'{name}{{model_name="",reason="backend_unavailable"}} 0.0' in text
