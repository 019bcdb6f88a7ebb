"""The checks of all answers find errors, and the schemas are valid."""

import json
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from tests.openai_shapes import SCHEMAS, check, check_answer, watched

USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2, "gpu_seconds": 0.5}
MESSAGE: dict[str, Any] = {"role": "assistant", "content": "Hi", "refusal": None}
CHOICE = {"index": 0, "message": MESSAGE, "logprobs": None, "finish_reason": "stop"}
COMPLETION: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [CHOICE],
    "usage": USAGE,
}


def with_message(**fields: Any) -> dict[str, Any]:
    return {**COMPLETION, "choices": [{**CHOICE, "message": {**MESSAGE, **fields}}]}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_valid_and_closed(name: str) -> None:
    """Each file is a JSON Schema of the draft it names, and all its objects are closed."""
    Draft202012Validator.check_schema(SCHEMAS[name])

    assert SCHEMAS[name]["$id"] == f"{name}.json"
    assert SCHEMAS[name]["additionalProperties"] is False


def test_valid_responses_pass() -> None:
    """OpenAI's own shape, and our marked extensions, are accepted."""
    check("chat.completion", COMPLETION)
    check("chat.completion", with_message(reasoning_content="Hm"))


@pytest.mark.parametrize(
    "body",
    [
        with_message(tool_calls=None),
        with_message(tool_calls=[]),
        with_message(annotations=None),
        with_message(audio=None),
        with_message(surprise=1),
        {**COMPLETION, "usage": {**USAGE, "prompt_tokens": "1"}},
        {**COMPLETION, "prompt_logprobs": None},
        {key: value for key, value in COMPLETION.items() if key != "created"},
        {**COMPLETION, "choices": [{**CHOICE, "finish_reason": None}]},
        {**COMPLETION, "choices": [{**CHOICE, "stop_reason": None}]},
        {**COMPLETION, "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}]},
    ],
)
def test_invalid_responses_fail(body: Any) -> None:
    """Null arrays, missing or extra keys, and wrong types are found."""
    with pytest.raises(AssertionError, match=r"not a valid chat\.completion"):
        check("chat.completion", body)


@pytest.mark.parametrize(
    "error",
    [
        {"message": "m", "type": "t", "param": None, "code": 400},
        {"message": "m", "type": "t", "param": None},
        {"object": "error", "message": "m", "type": "t", "param": None, "code": None},
    ],
)
def test_invalid_errors_fail(error: Any) -> None:
    """Numeric codes, and missing or extra keys, are found."""
    body = json.dumps({"error": error}).encode()
    with pytest.raises(AssertionError, match="not a valid error"):
        check_answer("/v1/models", 400, "application/json", body, complete=True)


def test_a_truncated_stream_fails() -> None:
    """A stream that ends without [DONE] or an error is found; an interrupted one is accepted."""
    chunk = {
        **{key: COMPLETION[key] for key in ("id", "created", "model")},
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}],
    }
    stream = f"data: {json.dumps(chunk)}\n\n".encode()
    check_answer("/v1/chat/completions", 200, "text/event-stream", stream + b"da", complete=False)
    with pytest.raises(AssertionError, match="does not end"):
        check_answer("/v1/chat/completions", 200, "text/event-stream", stream, complete=True)


def test_responses_to_clients_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong body that a client receives fails the test that requested it."""

    def answer(self: Any, request: httpx.Request) -> httpx.Response:
        body = httpx.ByteStream(b'{"detail":"Not Found"}')
        return httpx.Response(404, stream=body, headers={"content-type": "application/json"})

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", answer)
    with watched(), pytest.raises(AssertionError, match="not a valid error"):
        httpx.get("http://127.0.0.1:9/v1/models")
