"""deploy/envoy/edge.yaml in the real Envoy: limits, slow clients, and the edge's own responses."""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from rest_facade.config import FacadeSettings
from tests.name_server import NameServer
from tests.ports import free_ports
from tests.rollout.proxy import FOLDER, endpoint, envoy
from tokenizer_svc.config import TokenizerSettings
from trivium.wire.errors import ERRORS

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="127.0.0.2 is a loopback address by default only on Linux"
)

FACADE = "127.0.0.2"
URL = "/v1/chat/completions"
MAX_BODY_BYTES = FacadeSettings.model_fields["max_body_bytes"].default
HEAD = f"POST {URL} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


class Edge:
    """Envoy at `port`, the port where it expects facades, and its DNS server."""

    def __init__(self) -> None:
        self.port, self.grpc_port, self.facade_port = free_ports(3)
        self.names = NameServer()

    @contextlib.contextmanager
    def running(self, folder: Path) -> Iterator[None]:
        replaced = {
            endpoint("0.0.0.0", 8080): endpoint("127.0.0.1", self.port),
            endpoint("0.0.0.0", 8081): endpoint("127.0.0.1", self.grpc_port),
            endpoint("rest_facade", 8000): endpoint("facade.test", self.facade_port),
            endpoint("tokenizer_svc", 50051): endpoint("tokenizer.test", 1),
            # Shorter than deployed, so that tests do not wait as long.
            "request_headers_timeout: 10s": "request_headers_timeout: 1s",
            "request_timeout: 30s": "request_timeout: 2s",
            "int_value: 60000": "int_value: 2000",
        }
        with self.names, envoy("edge.yaml", self.names, folder, replaced):
            yield

    async def ask(self, request: str) -> tuple[int, Any, dict[str, str]]:
        """The status, JSON body and headers of the response to exactly these characters."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request.encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        status, *lines = head.strip().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        body = await reader.readexactly(int(headers["content-length"]))
        writer.close()
        assert "application/json" == headers["content-type"]
        return int(status.split()[1]), json.loads(body), headers


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    found = Edge()
    with found.running(tmp_path):
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", found.port)
                    writer.close()
                    break
                await asyncio.sleep(0.05)
        yield found


@contextlib.asynccontextmanager
async def facade(edge: Edge, answer: Any) -> AsyncIterator[list[bytes]]:
    """A server in a facade's place, healthy and known to the edge; yields the bodies it gets."""
    bodies: list[bytes] = []
    writers: list[asyncio.StreamWriter] = []
    before = asyncio.all_tasks()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if head.startswith(b"get /health "):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            else:
                length = int(head.partition(b"content-length:")[2].partition(b"\r")[0] or 0)
                bodies.append(await reader.readexactly(length))
                await answer(writer)
        writer.close()

    async with await asyncio.start_server(serve, FACADE, edge.facade_port) as server:
        edge.names.names["facade.test"] = (FACADE,)
        async with asyncio.timeout(60), httpx.AsyncClient(trust_env=False) as client:
            url = f"http://127.0.0.1:{edge.port}/health"
            while (await client.get(url)).status_code != 200:
                pass
        yield bodies
        # asyncio neither serves nor closes a connection accepted just when the server closes.
        asyncio.get_running_loop().remove_reader(server.sockets[0].fileno())
        await asyncio.sleep(0)
    while serving := asyncio.all_tasks() - before:  # the edge may be checking its health
        for writer in writers:
            writer.close()
        await asyncio.wait(serving, timeout=0.1)
    for writer in writers:
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def fine(writer: asyncio.StreamWriter) -> None:
    writer.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    )


async def test_the_largest_body_and_one_byte_more(edge: Edge) -> None:
    """The largest body that a facade accepts passes; larger ones get the facade's error."""
    head = f"{HEAD}Content-Length: %d\r\n\r\n"
    async with facade(edge, fine) as bodies:
        passed, _, _ = await edge.ask(head % MAX_BODY_BYTES + " " * MAX_BODY_BYTES)
        more = MAX_BODY_BYTES + 1
        status, body, _ = await edge.ask(head % more + " " * more)

    assert 200 == passed
    assert [MAX_BODY_BYTES] == [len(body) for body in bodies]
    assert (413, "request_too_large") == (status, body["error"]["code"])
    assert str(MAX_BODY_BYTES) in body["error"]["message"]


@pytest.mark.parametrize(
    ("request_text", "status", "code"),
    [
        (f"{HEAD}X: {'a' * 70_000}\r\n\r\n", 400, "invalid_value"),
        (HEAD + "".join(f"X{n}: a\r\n" for n in range(200)) + "\r\n", 400, "invalid_value"),
        ("GET /v1/models HTTP/1.1\r\n\r\n", 400, "invalid_value"),
        (f"{HEAD}Transfer-Encoding: chunked\r\n\r\nno\r\n", 400, "invalid_value"),
        (HEAD, 408, "request_read_timeout"),
        (f"{HEAD}Content-Length: 9\r\n\r\n{{", 408, "request_read_timeout"),
    ],
    ids=["large head", "many headers", "no host", "broken chunk", "slow head", "slow body"],
)
async def test_invalid_requests_are_refused_at_the_edge(
    edge: Edge, request_text: str, status: int, code: str
) -> None:
    """Heads that are too large, too slow or malformed, and missing bodies, stop at the edge."""
    async with facade(edge, fine) as bodies:
        found, body, _ = await edge.ask(request_text)

    assert (status, code) == (found, body["error"]["code"])
    assert [] == bodies


async def test_unreachable_facade(edge: Edge) -> None:
    """A name without addresses, and addresses without a listener, are 503 in OpenAI's format."""
    request = f"{HEAD}Content-Length: 2\r\n\r\n{{}}"
    answers = [await edge.ask(request)]
    async with facade(edge, fine):
        pass
    answers.append(await edge.ask(request))

    for status, body, headers in answers:
        assert (503, "backend_unavailable") == (status, body["error"]["code"])
        assert "1" == headers["retry-after"]


async def test_a_client_that_reads_nothing_is_disconnected(edge: Edge) -> None:
    """Otherwise it could occupy a slot of the generator indefinitely."""
    broken = asyncio.Event()

    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        try:
            while True:
                writer.write(b"data: {}\n\n" * 1000)
                await writer.drain()
        except ConnectionError:
            broken.set()

    async with facade(edge, endless):
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
        writer.write(f"{HEAD}Content-Length: 2\r\n\r\n{{}}".encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        async with asyncio.timeout(60):
            await broken.wait()
        writer.close()


def test_replaced_parts_are_in_the_deployed_config() -> None:
    """Names, ports, limits and error bodies are those of the services."""
    text = (FOLDER / "edge.yaml").read_text()

    def default(name: str) -> Any:
        return FacadeSettings.model_fields[name].default

    assert endpoint("rest_facade", default("port")) in text
    assert endpoint("tokenizer_svc", TokenizerSettings.model_fields["port"].default) in text
    assert f"request_timeout: {default('body_read_seconds'):.0f}s" in text
    assert f"max_request_bytes: {default('max_body_bytes')}" in text
    listener = yaml.safe_load(text)["static_resources"]["listeners"][0]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    mappers = manager["local_reply_config"]["mappers"]
    said = [mapper["body_format_override"]["json_format"]["error"] for mapper in mappers]
    assert 4 == len(said)
    for error in said:
        assert {"message", "type", "param", "code"} == set(error)
        assert error["type"] == ERRORS[error["code"]].type
