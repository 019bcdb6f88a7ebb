"""Bodies that are too large, and large ones that are allowed, do not delay other requests."""

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from tests.rest_facade.conftest import StartFacade
from tests.rest_facade.scripted_backend import MODEL, ScriptedBackend, delta, header, usage
from tests.rest_facade.test_facade_process import running

URL = "/v1/chat/completions"
LARGEST = 8 * 2**20
USER = {"role": "user", "content": "a"}
HEAD = b'{"model":"scripted","messages":[{"role":"user","content":"a"}],'


def filled(before: bytes, element: bytes, after: bytes) -> bytes:
    """A body of the maximum size with as many elements as fit."""
    count = (LARGEST - len(before) - len(after)) // (len(element) + 1)
    return before + b",".join([element] * count) + after


PART = b'{"type":"text","text":"a"}'
CALL = b'{"id":"a","type":"function","function":{"name":"f","arguments":"{}"}}'
TOOL = b'{"type":"function","function":{"name":"f"}}'
# By what exceeds its limit: the body, and the code and field of the error.
TOO_MUCH = {
    "messages": (
        filled(b'{"messages":[', b'{"role":"user","content":"a"}', b'],"model":"scripted"}'),
        ("array_above_max_length", "messages"),
    ),
    "parts": (
        filled(b'{"model":"scripted","messages":[{"role":"user","content":[', PART, b"]}]}"),
        ("array_above_max_length", "messages[0].content"),
    ),
    "calls": (
        filled(
            b'{"model":"scripted","messages":[{"role":"assistant","tool_calls":[', CALL, b"]}]}"
        ),
        ("array_above_max_length", "messages[0].tool_calls"),
    ),
    "tools": (filled(HEAD + b'"tools":[', TOOL, b"]}"), ("array_above_max_length", "tools")),
    "schema": (
        filled(
            HEAD + b'"tools":[{"type":"function","function":{"name":"f","parameters":{"anyOf":[',
            b'{"type":"object"}',
            b"]}}}]}",
        ),
        ("array_above_max_length", "tools[0].function.parameters.anyOf"),
    ),
    "logit_bias": (
        HEAD + b'"logit_bias":{' + b",".join(b'"%d":1' % n for n in range(500_000)) + b"}}",
        ("invalid_value", "logit_bias"),
    ),
    "unknown": (filled(HEAD + b'"foo":[', b"[]", b"]}"), ("array_above_max_length", "foo")),
    "numbers": (filled(HEAD + b'"foo":[', b"1.5", b"]}"), ("array_above_max_length", "foo")),
    "digits": (filled(HEAD + b'"foo":[', b"9" * 4_000, b"]}"), ("invalid_json", None)),
    "depth": (
        HEAD + b'"foo":' + b"[" * 4_000_000 + b"]" * 4_000_000 + b"}",
        ("invalid_json", None),
    ),
    "not an object": (filled(b"[", b"{}", b"]"), ("array_above_max_length", None)),
}
ALLOWED = {
    "one text": filled(
        b'{"model":"scripted","messages":[{"role":"user","content":"', b"\\n" * 999, b'"}]}'
    ),
    "2,048 messages": json.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": "ä" * 600}] * 2_048}
    ).encode(),
    "numbers": HEAD + b'"foo":[' + b",".join([b"12345"] * 500_000) + b"]}",
    "fields": HEAD + b'"foo":{' + b",".join(b'"%d":1' % n for n in range(32_000)) + b"}}",
}


async def post(client: httpx.AsyncClient, body: bytes) -> httpx.Response:
    return await client.post(URL, content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize("what", TOO_MUCH)
async def test_requests_over_a_limit_name_the_field(
    client: httpx.AsyncClient, backend: ScriptedBackend, what: str
) -> None:
    """The error names the field that is too large, whatever else is in the body."""
    body, expected = TOO_MUCH[what]
    reply = await post(client, body)

    assert 400 == reply.status_code
    error = reply.json()["error"]
    assert expected == (error["code"], error["param"])
    assert [] == backend.requests


@pytest.mark.parametrize("what", ALLOWED)
async def test_large_requests_within_the_limits(client: httpx.AsyncClient, what: str) -> None:
    """Long texts, and many numbers or fields, are accepted."""
    assert 200 == (await post(client, ALLOWED[what])).status_code


def asks(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [USER]} | fields


PARTS = [{"type": "text", "text": "a"}] * 1_024
CALLS = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}] * 1_024
TOOLS = [{"type": "function", "function": {"name": f"f{n}"}} for n in range(129)]


@pytest.mark.parametrize(
    ("most", "more", "param"),
    [
        (asks(messages=[USER] * 2_048), asks(messages=[USER] * 2_049), "messages"),
        (
            asks(messages=[{"role": "user", "content": PARTS}] * 8),
            asks(messages=[{"role": "user", "content": PARTS}] * 8 + [USER]),
            "messages[8].content",
        ),
        (
            asks(messages=[{"role": "assistant", "tool_calls": CALLS}] * 4 + [USER]),
            asks(
                messages=[
                    *[{"role": "assistant", "tool_calls": CALLS}] * 4,
                    {"role": "assistant", "tool_calls": CALLS[:1]},
                ]
            ),
            "messages[4].tool_calls",
        ),
        (asks(tools=TOOLS[:128]), asks(tools=TOOLS), "tools"),
        (
            asks(logit_bias=dict.fromkeys(map(str, range(16_384)), 1)),
            asks(logit_bias=dict.fromkeys(map(str, range(16_385)), 1)),
            "logit_bias",
        ),
        (
            asks(allowed_token_ids=[*range(16_384)]),
            asks(allowed_token_ids=[*range(16_385)]),
            "allowed_token_ids",
        ),
    ],
)
async def test_limits_are_inclusive(
    client: httpx.AsyncClient, most: dict[str, Any], more: dict[str, Any], param: str
) -> None:
    """The maximum is accepted, and one more is refused."""
    allowed, refused = await client.post(URL, json=most), await client.post(URL, json=more)

    assert 200 == allowed.status_code, allowed.text
    assert (400, param) == (refused.status_code, refused.json()["error"]["param"])


async def test_other_paths_have_the_same_limits(start_facade: StartFacade) -> None:
    """Other paths have the same limits."""
    client = await start_facade()
    refused = await client.post("/detokenize", json={"model": MODEL, "tokens": [1] * 524_289})
    conversation = {"model": MODEL, "messages": [USER] * 2_049}

    assert "array_above_max_length" == refused.json()["error"]["code"]
    assert (
        "messages" == (await client.post("/tokenize", json=conversation)).json()["error"]["param"]
    )


async def test_large_bodies_do_not_block_other_requests(backend: ScriptedBackend) -> None:
    """While they are read and parsed, another stream continues and liveness is answered."""
    bodies = [body for body, _ in TOO_MUCH.values()] + list(ALLOWED.values())
    async with running(backend) as (_, client):
        backend.script = (header(), *[delta("a"), 0.005] * 20_000, delta(finish="STOP"), usage())
        async with client.stream("POST", URL, json=asks(stream=True)) as stream:
            backend.script = (header(), delta("a", finish="STOP"), usage())
            events = stream.aiter_bytes()
            longest = 0.0

            async def listen() -> None:
                nonlocal longest
                last = time.monotonic()
                async for _ in events:
                    longest = max(longest, time.monotonic() - last)
                    last = time.monotonic()

            listening = asyncio.create_task(listen())
            for body in bodies:
                reply, live = await asyncio.gather(post(client, body), client.get("/health/live"))

                assert reply.status_code in (200, 400)
                assert 200 == live.status_code
            listening.cancel()

    # Far more than needed, in case the machine is busy with something else.
    assert longest < 2
