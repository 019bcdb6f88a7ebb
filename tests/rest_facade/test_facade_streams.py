"""Streams byte for byte: refactoring does not change what clients parse."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.rest_facade.scripted_backend import (
    MODEL,
    ScriptedBackend,
    Step,
    call,
    delta,
    header,
    logprob,
    text_delta,
    text_logprob,
    usage,
)
from trivium.wire.errors import ServiceError

RECORDED = Path(__file__).with_name("streams")
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
WITH_USAGE = {"stream_options": {"include_usage": True}}
WITH_COUNTS = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
ODD_TEXT = 'é "quoted" \\ \n\r\t\x00\x1f\x7f / 日本 😀 \x85 \u2028 \u2029 </script>'

STREAMS: dict[str, tuple[str, dict[str, Any], Sequence[Step]]] = {
    "chat": (CHAT, {}, (header(), delta("Hello"), delta(tokens=2, finish="STOP"), usage())),
    "chat_text_of_all_kinds": (
        CHAT,
        WITH_USAGE,
        (header(), delta(ODD_TEXT), delta("end", tokens=2, finish="LENGTH"), usage()),
    ),
    "chat_choices": (
        CHAT,
        {"n": 2, "service_tier": "auto", **WITH_COUNTS},
        (
            header(),
            delta("a", index=1),
            delta("b", tokens=2),
            delta(tokens=3, finish="STOP"),
            delta("c", index=1, tokens=5, finish="STOP"),
            usage(8),
        ),
    ),
    "chat_logprobs": (
        CHAT,
        {"logprobs": True, "top_logprobs": 1},
        (
            header(),
            delta("Hi", logprobs=[logprob("H", -1e-07), logprob("i", -0.0)]),
            delta(tokens=3, logprobs=[logprob("é\u2028", -12.345678901234567)]),
            delta(tokens=3, finish="STOP"),
            usage(),
        ),
    ),
    "chat_tools": (
        CHAT,
        {"logprobs": True, **WITH_USAGE},
        (
            header(),
            delta(reasoning_content="Hm\n"),
            delta("So", reasoning_content="m", tokens=2),
            delta(tool_calls=[call("f", '{"a":')], tokens=3, logprobs=[logprob("x")]),
            delta(tool_calls=[call(arguments='"\u2029"}'), call("g", "{}", position=1)], tokens=4),
            delta(tool_calls=[call("h", position=2)], tokens=5),
            delta(tokens=5, finish="TOOL_CALLS"),
            usage(5, reasoning_tokens=1),
        ),
    ),
    "chat_tools_alone": (
        CHAT,
        {"stream_options": {"include_usage": False}},
        (header(), delta(tool_calls=[call("f")], finish="TOOL_CALLS"), usage()),
    ),
    "chat_error": (
        CHAT,
        WITH_COUNTS,
        (header(), delta("He"), ServiceError("backend_unavailable", 'It "went"\u2028.')),
    ),
    "text": (
        TEXT,
        {},
        (header(), text_delta(ODD_TEXT), text_delta("d", tokens=2, finish="STOP"), usage()),
    ),
    "text_logprobs": (
        TEXT,
        {"echo": True, "logprobs": 1, "service_tier": "default", **WITH_COUNTS},
        (
            header(),
            text_delta("Hi", logprobs=[text_logprob(None, 0), text_logprob(logprob("i"), 1)]),
            text_delta(tokens=2, logprobs=[text_logprob(logprob("é"), 2)]),
            text_delta("b", index=1, tokens=4),
            text_delta(tokens=2, finish="LENGTH"),
            text_delta(index=1, tokens=4, finish="STOP"),
            usage(6),
        ),
    ),
    "text_usage": (
        TEXT,
        WITH_USAGE,
        (header(), text_delta("Hello"), text_delta(finish="STOP"), usage()),
    ),
}


async def received(client: httpx.AsyncClient, backend: ScriptedBackend, name: str) -> bytes:
    """The body of one stream."""
    path, fields, script = STREAMS[name]
    backend.script = backend.text_script = script
    prompt: dict[str, Any] = {"prompt": "Hi"}
    if path == CHAT:
        prompt = {"messages": [{"role": "user", "content": "Hi"}]}
    answer = await client.post(path, json={"model": MODEL, "stream": True, **prompt, **fields})
    assert 200 == answer.status_code, answer.text
    return answer.content


@pytest.mark.parametrize("name", STREAMS)
async def test_streams_are_byte_for_byte_as_recorded(
    client: httpx.AsyncClient, backend: ScriptedBackend, name: str
) -> None:
    """Every event of a stream is byte for byte as recorded."""
    assert (RECORDED / f"{name}.sse").read_bytes() == await received(client, backend, name)
