"""Offers to upgrade to another protocol are ignored, and the request is answered."""

import asyncio
import json
from collections.abc import Sequence

import httpx
import pytest

from tests.rest_facade.scripted_backend import MODEL, ScriptedBackend

JAVA = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
WEBSOCKET = (
    "Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
OFFERS = {"h2c": JAVA, "websocket": WEBSOCKET, "none": ""}


def post(text: str, offer: str, chunked: bool = False) -> bytes:
    """A request with `text` as its prompt."""
    asked = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
    body = json.dumps(asked, ensure_ascii=False).encode()
    if chunked:
        pieces = [body[:7], body[7:40], body[40:], b""]
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\n{offer}{length}\r\n\r\n"
    )
    return head.encode() + body


async def exchange(client: httpx.AsyncClient, packets: Sequence[bytes], answers: int) -> list[int]:
    """The statuses of the answers to packets sent over one connection."""
    url = client.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    for packet in packets:
        writer.write(packet)
        await writer.drain()
        await asyncio.sleep(0.001 if len(packets) > 1 else 0)
    statuses = []
    for _ in range(answers):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        statuses.append(int(head.split()[1]))
        length = head.partition("content-length: ")[2].partition("\r\n")[0]
        await reader.readexactly(int(length))
    writer.close()
    return statuses


def texts(backend: ScriptedBackend) -> list[str]:
    return [request.messages[0].content[0].text for request in backend.requests]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("size", [1, 200_000])
async def test_an_upgrade_offer_with_a_body(
    client: httpx.AsyncClient, backend: ScriptedBackend, offer: str, chunked: bool, size: int
) -> None:
    """The answer is the same as without the offer, however the body is sent."""
    text = "ä" * size
    statuses = await exchange(client, [post(text, OFFERS[offer], chunked)], 1)

    assert [200] == statuses
    assert [text] == texts(backend)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("step", [1, 50, 1000])
async def test_the_body_may_follow_the_head(
    client: httpx.AsyncClient, backend: ScriptedBackend, step: int, chunked: bool
) -> None:
    """This holds wherever packets split the head and the body."""
    data = post("Hello", JAVA, chunked)
    packets = [data[at : at + step] for at in range(0, len(data), step)]
    statuses = await exchange(client, packets, 1)

    assert [200] == statuses
    assert ["Hello"] == texts(backend)


@pytest.mark.parametrize("whole", [True, False])
async def test_several_requests_on_one_connection(
    client: httpx.AsyncClient, backend: ScriptedBackend, whole: bool
) -> None:
    """Requests with and without offers, all sent before the first answer."""
    offers = ["", JAVA, JAVA, "", WEBSOCKET, ""]
    requests = [post(f"Text {n}", offer, n % 2 == 0) for n, offer in enumerate(offers)]
    statuses = await exchange(client, [b"".join(requests)] if whole else requests, len(requests))

    assert [200] * len(offers) == statuses
    assert [f"Text {n}" for n in range(len(offers))] == texts(backend)


async def test_an_upgrade_offer_without_a_body(client: httpx.AsyncClient) -> None:
    """A GET with an offer is answered, and the connection stays usable."""
    get = f"GET /health/live HTTP/1.1\r\nHost: localhost\r\n{WEBSOCKET}\r\n".encode()

    assert [200, 200] == await exchange(client, [get, get], 2)


async def test_an_upgrade_offer_does_not_lift_the_head_limit(client: httpx.AsyncClient) -> None:
    """An offer does not allow a larger head."""
    padding = "".join(f"x-{number}: {'y' * 1000}\r\n" for number in range(70))

    assert [400] == await exchange(client, [post("Hello", padding + JAVA)], 1)


@pytest.mark.parametrize("target", ["example.org:443", "http://example.org/", "/health"])
async def test_connect_is_refused(client: httpx.AsyncClient, target: str) -> None:
    """CONNECT is refused, with or without an offer."""
    for offer in ("", JAVA):
        head = f"CONNECT {target} HTTP/1.1\r\nHost: example.org\r\n{offer}\r\n"

        assert [400] == await exchange(client, [head.encode()], 1)
