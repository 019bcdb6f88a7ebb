"""Errors as clients of the facade get them: always OpenAI's shape, always the right status."""

import asyncio
import json
import logging
import string
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rest_facade.errors import ErrorResponse, error_body
from rest_facade.sse import sse_event
from tests.rest_facade.conftest import StartFacade, facade
from tests.rest_facade.scripted_backend import HELLO, MODEL, ScriptedBackend, delta, header
from tests.tokenizer_svc.scripted_generator import ScriptedGenerator
from trivium.chat.v1 import chat_pb2
from trivium.wire import telemetry
from trivium.wire.errors import ERRORS, ServiceError

REQUEST = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
URL = "/v1/chat/completions"


def check_shape(answer: httpx.Response) -> dict[str, Any]:
    """The error object of a response, with its shape checked."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = answer.json()["error"]
    assert answer.json().keys() == {"error"}
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    kind = ERRORS[error["code"]]
    assert (kind.http, kind.type) == (answer.status_code, error["type"])
    return error


@pytest.mark.parametrize("code", sorted(set(ERRORS) - {"client_closed_request", "invalid_api_key"}))
async def test_errors_of_the_next_stage(
    client: httpx.AsyncClient, backend: ScriptedBackend, code: str
) -> None:
    """Every error in the table passes through gRPC, streaming or not, with its HTTP status."""
    backend.script = (ServiceError(code, "Why.", param="messages", retry_after=90),)
    whole = await client.post(URL, json=REQUEST)
    streamed = await client.post(URL, json=REQUEST | {"stream": True})

    for answer in (whole, streamed):
        error = check_shape(answer)
        assert (error["code"], error["param"]) == (code, "messages")
        retriable = ERRORS[code].http in (429, 503)
        assert answer.headers.get("retry-after") == ("60" if retriable else None)


async def test_a_refused_stage_key_is_not_the_clients_error(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """The key there is the facade's own: its client can do nothing about it."""
    backend.script = (ServiceError("invalid_api_key", "Why."),)
    whole = await client.post(URL, json=REQUEST)
    streamed = await client.post(URL, json=REQUEST | {"stream": True})

    assert ["backend_unavailable"] * 2 == [check_shape(each)["code"] for each in (whole, streamed)]


async def test_a_refused_stage_key_is_logged_once(
    client: httpx.AsyncClient, backend: ScriptedBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once, however many requests and probes are refused, and again for another reason
    or after the key was accepted."""

    async def refused(why: str) -> None:
        backend.script = (ServiceError("invalid_api_key", why),)
        await client.post(URL, json=REQUEST)

    for why in ("No key.", "No key.", "Wrong key."):
        await refused(why)
    await client.get("/v1/models")
    await refused("Wrong key.")

    told = "the tokenizer refuses this stage's key: "
    assert [f"{told}{why}" for why in ("No key.", "Wrong key.", "Wrong key.")] == [
        record.message for record in caplog.records if told in record.message
    ]


@pytest.mark.parametrize(
    ("fields", "blamed", "shown"),
    [
        ({"max_tokens": 5}, "max_completion_tokens", "max_tokens"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "max_completion_tokens"),
        ({"guided_json": {}}, "structured_outputs.json", "guided_json"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", None),
        ({}, "max_completion_tokens", None),
    ],
)
async def test_errors_use_the_clients_field_names(
    client: httpx.AsyncClient,
    backend: ScriptedBackend,
    fields: dict[str, Any],
    blamed: str,
    shown: str | None,
) -> None:
    """If the client used a field's old name, errors from the next stage use it too."""
    backend.script = (ServiceError("invalid_value", f"Bad '{blamed}'.", blamed),)
    whole = await client.post(URL, json=REQUEST | fields)
    streamed = await client.post(URL, json=REQUEST | fields | {"stream": True})

    for answer in (whole, streamed):
        assert check_shape(answer)["param"] == (shown or blamed)
        assert check_shape(answer)["message"] == f"Bad '{shown or blamed}'."


async def test_error_mid_stream(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """A stream that fails ends with an error event, without [DONE]."""
    backend.script = (header(), delta("He"), ServiceError("backend_unavailable", "It is gone."))
    answer = await client.post(URL, json=REQUEST | {"stream": True})
    last = answer.text.split("\n\n")[-2]

    assert answer.status_code == 200
    assert answer.text.endswith("\n\n")
    assert json.loads(last.removeprefix("data: ")) == {
        "error": {
            "message": "It is gone.",
            "type": "server_error",
            "param": None,
            "code": "backend_unavailable",
        }
    }


async def test_unknown_events_are_errors(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """An event that the facade cannot read is a 500, or an error event in a running stream."""
    unknown = chat_pb2.StreamChatCompletionResponse()
    backend.script = (unknown,)
    first = await client.post(URL, json=REQUEST | {"stream": True})
    backend.script = (header(), delta("He"), unknown)
    later = await client.post(URL, json=REQUEST | {"stream": True})

    assert first.status_code == 500
    assert check_shape(first)["code"] == "internal_error"
    assert later.status_code == 200
    assert "internal_error" in later.text.split("\n\n")[-2]


async def test_internal_errors_reveal_nothing(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """An unexpected error shows a generic message and the request id, streaming or not."""
    backend.script = (header(), delta("He"), RuntimeError("secret"))
    whole = await client.post(URL, json=REQUEST, headers={"x-request-id": "r-1"})
    streamed = await client.post(
        URL, json=REQUEST | {"stream": True}, headers={"x-request-id": "r-2"}
    )

    assert check_shape(whole)["code"] == "internal_error"
    assert "r-1" in whole.text
    assert "r-2" in streamed.text
    assert "secret" not in whole.text + streamed.text


@pytest.mark.parametrize("script", [(), (header(), delta("He")), (delta("He"),)])
async def test_incomplete_streams_end_with_an_error(
    client: httpx.AsyncClient, backend: ScriptedBackend, script: Any
) -> None:
    """A stream without header or usage ends with an error, never with [DONE]."""
    backend.script = script
    answer = await client.post(URL, json=REQUEST | {"stream": True})

    assert "internal_error" in answer.text
    assert "[DONE]" not in answer.text


class BehindAMesh(ScriptedBackend):
    """A proxy in front of it refuses some calls."""

    async def CreateChatCompletion(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "RBAC: access denied")

    async def StreamChatCompletion(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield header()
        yield delta("He")
        await context.abort(grpc.StatusCode.UNKNOWN, "Stream removed")

    async def ListModels(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "Jwt is missing")


@pytest.fixture
def errors_logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """The request id and message of each log line at error level."""
    found: list[tuple[str, str]] = []

    def note(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            found.append((telemetry.request_id.get(), record.getMessage()))
        return True

    caplog.handler.addFilter(note)
    return found


async def test_a_proxys_status_is_not_revealed(errors_logged: list[tuple[str, str]]) -> None:
    """Its message is only logged, once per request, with the replica that returned it."""
    stage = BehindAMesh()
    await stage.start()
    async with facade(stage.port, {}) as url, httpx.AsyncClient(base_url=url) as client:
        answers = [
            await client.post(URL, json=REQUEST, headers={"x-request-id": "whole"}),
            await client.post(
                URL, json=REQUEST | {"stream": True}, headers={"x-request-id": "streamed"}
            ),
            await client.get("/v1/models", headers={"x-request-id": "read"}),
        ]
    await stage.die()

    assert [500, 200, 500] == [answer.status_code for answer in answers]
    for answer in answers:
        assert "internal_error" in answer.text
        assert not any(text in answer.text for text in ("RBAC", "Stream removed", "Jwt"))
    assert [
        (
            "whole",
            f"replica 127.0.0.1:{stage.port} returned PERMISSION_DENIED: RBAC: access denied",
        ),
        ("streamed", f"replica 127.0.0.1:{stage.port} returned UNKNOWN: Stream removed"),
        ("read", f"replica 127.0.0.1:{stage.port} returned UNAUTHENTICATED: Jwt is missing"),
    ] == errors_logged


async def test_a_target_that_is_another_stage(errors_logged: list[tuple[str, str]]) -> None:
    """A facade that calls a generator's port answers that no tokenizer is available."""
    server, port = await ScriptedGenerator("r1").serve()
    async with facade(port, {}) as url, httpx.AsyncClient(base_url=url) as client:
        answers = [
            await client.post(URL, json=body, headers={"x-request-id": name})
            for name, body in (("whole", REQUEST), ("streamed", REQUEST | {"stream": True}))
        ]
    await server.drain(0, 0)

    assert ["backend_unavailable"] * 2 == [check_shape(answer)["code"] for answer in answers]
    line = f"replica 127.0.0.1:{port} returned UNIMPLEMENTED: Method not found!"
    assert [("whole", line), ("streamed", line)] == errors_logged


async def test_unknown_paths_and_methods(client: httpx.AsyncClient) -> None:
    """Unknown paths are 404 and wrong methods 405 with Allow, both with a JSON error."""
    nowhere = await client.get("/v1/nowhere")
    slash = await client.post("/v1/chat/completions/", json=REQUEST)
    wrong = await client.get(URL)
    no_model = await client.get("/v1/models/none")

    without = await client.post("/chat/completions", json=REQUEST)

    assert check_shape(nowhere)["code"] == "unknown_url"
    assert "The docs are at /docs." in nowhere.text
    for near in (slash, without):
        assert check_shape(near)["code"] == "unknown_url"
        assert "Did you mean /v1/chat/completions?" in near.text
    assert check_shape(wrong)["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"
    assert check_shape(no_model)["code"] == "model_not_found"


NO_URL, NO_MODEL, WRONG = (
    (404, "unknown_url"),
    (404, "model_not_found"),
    (405, "method_not_allowed"),
)


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        *(("GET", path + "/", NO_URL) for path in ("/health", "/health/live", "/metrics", "/docs")),
        *(("POST", path + "/", NO_URL) for path in ("/v1/completions", "/tokenize", "/detokenize")),
        ("GET", "/v1/models/", NO_URL),
        ("GET", "/v1/models/?x=1", NO_URL),
        ("GET", "/v1/models//", NO_MODEL),
        ("GET", "/v1//models", NO_URL),
        ("GET", "//v1/models", NO_URL),
        ("GET", "/v1/", NO_URL),
        ("GET", "//", NO_URL),
        ("POST", "/v1//chat/completions", NO_URL),
        ("POST", "//v1/chat/completions", NO_URL),
        ("GET", "/openapi.json/", NO_URL),
        ("GET", "/tokenizer_info/", NO_URL),
        ("GET", "/v1/models/%20", NO_MODEL),
        ("GET", "/v1/models/%00", NO_MODEL),
        ("GET", "/v1/models/%0d%0aa: b", NO_URL),
        ("GET", "/v1/models/%2F", NO_MODEL),
        ("GET", "/v1/models/%2e%2e/%2e%2e", NO_MODEL),
        ("GET", "/v1/models/%", NO_MODEL),
        ("GET", "/v1/models/%zz", NO_MODEL),
        ("GET", "/v1/models/%ff%fe", NO_MODEL),
        ("GET", "/v1/models/%ed%a0%80", NO_MODEL),
        ("GET", f"/v1/models/{'x' * 9000}", NO_MODEL),
        ("GET", "/v1%2Fmodels", (200, None)),
        ("HEAD", "/v1/models/", (404, None)),
        ("HEAD", "/v1/models", (200, None)),
        ("HEAD", f"/v1/models/{MODEL}", (200, None)),
        ("POST", "/v1/models/", WRONG),
        ("OPTIONS", "/v1/models/", WRONG),
        ("OPTIONS", "/v1/models", WRONG),
        ("OPTIONS", URL, WRONG),
        ("OPTIONS", "*", NO_URL),
    ],
)
async def test_malformed_paths(
    client: httpx.AsyncClient, method: str, target: str, expected: tuple[int, str | None]
) -> None:
    """Extra slashes, empty segments, odd escapes: what does not exist is 404, never 400 or 500."""
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    head = f"{method} {target.replace(' ', '%20')} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    writer.write(f"{head}content-length: 0\r\n\r\n".encode())
    answer, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    error = json.loads(body).get("error", {}) if body else {}

    assert expected == (int(answer.split()[1]), error.get("code"))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/json"}, 200),
        ({"content-type": 'application/json; charset="UTF-8"'}, 200),
        ({"content-type": "application/json; charset=utf8"}, 200),
        ({"content-type": "application/vnd.api+json"}, 200),
        ({"content-type": "application/json; charset=utf-16"}, 415),
        ({"content-type": "application/xml"}, 415),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "text/json"}, 415),
        ({"content-type": "text/vnd.api+json"}, 415),
        ({}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
    ],
)
async def test_media_types(client: httpx.AsyncClient, headers: dict[str, str], status: int) -> None:
    """Only uncompressed JSON in UTF-8 is accepted."""
    answer = await client.post(URL, content=json.dumps(REQUEST), headers=headers)

    assert answer.status_code == status
    assert status == 200 or check_shape(answer)["code"] == "unsupported_media_type"


async def test_large_bodies(start_facade: StartFacade, backend: ScriptedBackend) -> None:
    """A body over the limit is 413, whether its size was declared or not."""
    client = await start_facade(max_body_bytes=1024)
    large = json.dumps(REQUEST | {"user": "x" * 1024}).encode()

    async def pieces() -> Any:
        for start in range(0, len(large), 100):
            yield large[start : start + 100]

    json_type = {"content-type": "application/json"}
    declared = await client.post(URL, content=large, headers=json_type)
    chunked = await client.post(URL, content=pieces(), headers=json_type)

    assert check_shape(declared)["code"] == "request_too_large"
    assert check_shape(chunked)["code"] == "request_too_large"
    assert backend.requests == []


@pytest.mark.parametrize(
    ("length", "status", "code"),
    [(10, 408, "request_read_timeout"), (2000, 413, "request_too_large")],
)
async def test_slow_bodies(start_facade: StartFacade, length: int, status: int, code: str) -> None:
    """A body that does not arrive in time is 408; one that says that it is too large is not waited
    for."""
    client = await start_facade(body_read_seconds=0.05, max_body_bytes=1024)
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n{" % length
    )
    answer = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()

    assert answer.startswith(f"HTTP/1.1 {status}")
    assert code in answer


@pytest.mark.parametrize(
    "head",
    [
        b"NONSENSE\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n" + b"x: y\r\n" * 101 + b"\r\n",
        b"GET /v1/models HTTP/1.1\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
    ],
)
async def test_malformed_http_requests(client: httpx.AsyncClient, head: bytes) -> None:
    """Even requests that the HTTP parser rejects are answered with an error object."""
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    writer.write(head)
    answer = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()

    assert answer[0].startswith(b"HTTP/1.1 4")
    assert json.loads(answer[2])["error"].keys() == {"message", "type", "param", "code"}


async def test_a_call_times_out(start_facade: StartFacade, backend: ScriptedBackend) -> None:
    """After the timeout a call ends with 504 and x-should-retry false, or with an error event."""
    client = await start_facade(request_timeout_seconds=0.2)
    backend.script = (header(), delta("He"), None)
    whole = await client.post(URL, json=REQUEST)
    streamed = await client.post(URL, json=REQUEST | {"stream": True})

    assert check_shape(whole)["code"] == "deadline_exceeded"
    assert whole.headers["x-should-retry"] == "false"
    assert "deadline_exceeded" in streamed.text
    # gRPC rounds a deadline up to a millisecond on the wire.
    assert all(left is not None and left <= 0.202 for left in backend.deadlines)


def test_retry_after_is_from_1_to_60_seconds() -> None:
    """Retry-After is a whole number of seconds from 1 to 60, which clients obey."""
    waits = [0, 0.2, 1.5, 60, 3600]
    answers = [ErrorResponse(ServiceError("queue_full", "", retry_after=wait)) for wait in waits]

    assert ["1", "1", "2", "60", "60"] == [answer.headers["retry-after"] for answer in answers]


def test_line_breaks_do_not_split_an_error_event() -> None:
    """Line breaks in a message do not break the event."""
    event = sse_event(error_body(ServiceError("invalid_value", "a\n\nb\u2028c"))).decode()

    assert event.count("\n") == 2
    assert json.loads(event.removeprefix("data: "))["error"]["message"] == "a\n\nb\u2028c"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["user", "text", "auto", "Hi"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(string.ascii_lowercase, max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)
FULL = REQUEST | {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "n"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "content": "x", "tool_call_id": "c"},
    ],
    "temperature": 1,
    "top_k": 1,
    "logit_bias": {"1": 1},
    "stop": ["a"],
    "seed": 1,
    "n": 1,
    "max_tokens": 1,
    "metadata": {"a": "b"},
    "logprobs": True,
    "top_logprobs": 1,
    "stream": True,
    "stream_options": {"include_usage": True},
    "stop_token_ids": [1],
    "allowed_token_ids": [1],
    "bad_words": ["a"],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}},
    "chat_template_kwargs": {"a": {"b": 1}},
    "reasoning_effort": "low",
    "service_tier": "auto",
}


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all parts of a JSON value."""
    inner: Any = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    return [path, *(place for key, v in inner for place in _places(v, (*path, key)))]


def _replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    if isinstance(value, dict):
        return {k: _replaced(v, path[1:], new) if k == path[0] else v for k, v in value.items()}
    return [_replaced(v, path[1:], new) if i == path[0] else v for i, v in enumerate(value)]


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    path=st.sampled_from(_places(FULL)),
    new=JSON,
    cut=st.none() | st.integers(0, 700),
)
async def test_mutated_bodies_never_cause_a_5xx(
    client: httpx.AsyncClient, backend: ScriptedBackend, path: Any, new: Any, cut: int | None
) -> None:
    """A valid body with any part replaced, or truncated, is answered or refused with 4xx."""
    backend.script = HELLO
    body = json.dumps(_replaced(FULL, path, new))[:cut]
    answer = await client.post(URL, content=body, headers={"content-type": "application/json"})

    assert answer.status_code < 500
    if answer.status_code != 200:
        check_shape(answer)
    elif "data: " in answer.text:
        assert answer.text.endswith("data: [DONE]\n\n")
