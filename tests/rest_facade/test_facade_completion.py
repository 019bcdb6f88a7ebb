"""Chat completions through the facade, as clients see them."""

import json
from typing import Any

import httpx
import pytest

from tests.completion_requests import chat_request
from tests.rest_facade.scripted_backend import (
    MODEL,
    SCORED,
    SCORED_JSON,
    ScriptedBackend,
    call,
    delta,
    header,
    logprob,
    usage,
)
from trivium.chat.v1 import chat_pb2

REQUEST = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 2,
    "total_tokens": 9,
    "gpu_seconds": 1.5,
    "prompt_tokens_details": {"cached_tokens": 3, "audio_tokens": 0},
    "completion_tokens_details": {
        "reasoning_tokens": 0,
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
}


async def post(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=REQUEST | fields)


def chunks(text: str) -> list[Any]:
    """The JSON of a stream's events, with their framing checked."""
    assert text.endswith("\n\n")
    events = text.split("\n\n")[:-1]
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [d if d == "[DONE]" else json.loads(d) for d in (e[6:] for e in events)]


async def test_non_streaming_answer(client: httpx.AsyncClient) -> None:
    """An answer without `stream` is OpenAI's object, field by field."""
    answer = await post(client)

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "id": "chatcmpl-" + "0" * 32,
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": MODEL,
        "system_fingerprint": "fp_scripted",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello world",
                    "refusal": None,
                    "annotations": [],
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }


async def test_stream(client: httpx.AsyncClient) -> None:
    """A stream is a role chunk, text, one finish chunk with an empty delta, and [DONE]."""
    answer = await post(client, stream=True)
    events = chunks(answer.text)

    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "Hello"}, None),
        ({"content": " world"}, None),
        ({}, "stop"),
    ] == [(e["choices"][0]["delta"], e["choices"][0]["finish_reason"]) for e in events[:-1]]
    assert [None] * 4 == [event["choices"][0]["logprobs"] for event in events[:-1]]
    assert events[-1] == "[DONE]"
    assert events[0] == {
        "id": "chatcmpl-" + "0" * 32,
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": MODEL,
        "system_fingerprint": "fp_scripted",
        "choices": [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
    }


async def test_stream_usage(client: httpx.AsyncClient) -> None:
    """With include_usage the last chunk has usage and no choices; in the others usage is null."""
    answer = await post(client, stream=True, stream_options={"include_usage": True})
    *others, last, done = chunks(answer.text)

    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"] == USAGE
    assert [None] * 4 == [chunk["usage"] for chunk in others]


async def test_continuous_usage(client: httpx.AsyncClient) -> None:
    """With continuous_usage_stats every chunk has the usage so far."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = await post(client, stream=True, stream_options=options)
    *others, last, _ = chunks(answer.text)

    assert [(7, 0, 7), (7, 1, 8), (7, 2, 9), (7, 2, 9)] == [
        tuple(chunk["usage"].values()) for chunk in others
    ]
    assert last["usage"] == USAGE


async def test_choices_interleave(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """Each index has its own role and finish chunk, in the order in which they arise."""
    backend.script = (
        header(),
        delta("a", index=0),
        delta("b", index=1),
        delta("B", index=1, tokens=2, finish="LENGTH"),
        delta("A", index=0, tokens=2, finish="STOP"),
        usage(4),
    )
    answer = await post(client, stream=True, n=2)
    choices = [event["choices"][0] for event in chunks(answer.text)[:-1]]

    assert [
        (0, ""),
        (0, "a"),
        (1, ""),
        (1, "b"),
        (1, "B"),
        (1, "length"),
        (0, "A"),
        (0, "stop"),
    ] == [(c["index"], c["finish_reason"] or c["delta"]["content"]) for c in choices]
    assert backend.requests[0].options.n == 2


async def test_logprobs(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """Log-probabilities have token, bytes and alternatives, streaming or not."""
    backend.script = (
        header(),
        delta("é", logprobs=[logprob("é")]),
        delta(finish="STOP"),
        usage(1),
    )
    entry = {"token": "é", "logprob": -0.5, "bytes": [195, 169]}
    expected = {"content": [{**entry, "top_logprobs": [entry]}], "refusal": None}
    whole = await post(client, logprobs=True, top_logprobs=1)
    streamed = await post(client, logprobs=True, top_logprobs=1, stream=True)

    assert whole.json()["choices"][0]["logprobs"] == expected
    choices = [chunk["choices"][0] for chunk in chunks(streamed.text)[:-1]]
    assert [None, expected, None] == [choice["logprobs"] for choice in choices]
    assert ["", "é", None] == [choice["delta"].get("content") for choice in choices]


async def test_token_ids(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """With return_token_ids the answer has the tokens of the prompt and of each choice. In a stream
    the first chunk has the prompt's, and every later one its own: also tokens whose text is held
    back, those of reasoning and calls, and the one that ended the choice."""
    backend.script = (
        header([5, 6]),
        delta(reasoning_content="Hm", content="Hi", token_ids=[1, 2]),
        delta(tokens=3, token_ids=[3]),
        delta("!", index=1, tokens=1, token_ids=[7], finish="LENGTH"),
        delta(tool_calls=[call("f", "{}")], tokens=5, token_ids=[4, 8]),
        delta(tokens=6, token_ids=[2], finish="TOOL_CALLS"),
        usage(7),
    )
    whole = (await post(client, return_token_ids=True, n=2)).json()
    streamed = chunks((await post(client, return_token_ids=True, n=2, stream=True)).text)[:-1]
    plain = (await post(client, return_token_ids=False)).json()
    choices = [chunk["choices"][0] for chunk in streamed]

    assert [5, 6] == whole["prompt_token_ids"]
    assert [[1, 2, 3, 4, 8, 2], [7]] == [choice["token_ids"] for choice in whole["choices"]]
    assert [[5, 6]] + [None] * 9 == [chunk.get("prompt_token_ids") for chunk in streamed]
    assert [None, [1, 2], [], [3], [4, 8], [], [2]] == [
        choice.get("token_ids") for choice in choices if choice["index"] == 0
    ]
    assert [None, [7], []] == [
        choice.get("token_ids") for choice in choices if choice["index"] == 1
    ]
    assert ["tool_calls"] == [c["finish_reason"] for c in choices if c.get("token_ids") == [2]]
    assert "prompt_token_ids" not in plain
    assert "token_ids" not in plain["choices"][0]


async def test_prompt_logprobs(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """With prompt_logprobs the answer has those of the prompt's tokens and of the most likely ones,
    by token id; the first token has none. A stream would not have them, so that is refused."""
    backend.prompt_logprobs = SCORED
    answer = (await post(client, prompt_logprobs=1)).json()
    streamed = await post(client, prompt_logprobs=0, stream=True)

    assert answer["prompt_logprobs"] == SCORED_JSON
    assert list(answer["prompt_logprobs"][1]) == ["5", "9"]
    assert 1 == backend.requests[0].options.prompt_logprobs
    error = streamed.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_parameter_combination", "prompt_logprobs")


@pytest.mark.parametrize(
    "text", ['\u2028\u2029\x85\r\n\t\x00"\\', "🫠 鼜 👩‍🚀", "data: [DONE]\n\n"]
)
async def test_any_text_arrives_unchanged(
    client: httpx.AsyncClient, backend: ScriptedBackend, text: str
) -> None:
    """Any text arrives unchanged, and never breaks an event for clients that split lines."""
    backend.script = (header(), delta(text), delta(finish="STOP"), usage())
    whole = await post(client)
    streamed = await post(client, stream=True)
    lines = [line for line in streamed.text.splitlines() if line]

    assert whole.json()["choices"][0]["message"]["content"] == text
    assert chunks(streamed.text)[1]["choices"][0]["delta"]["content"] == text
    assert all(line.startswith("data: ") for line in lines)


async def test_every_field_is_passed_on(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """Each field of the request reaches the next stage with its value."""
    fields = {
        "temperature": 0,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.05,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repetition_penalty": 1.1,
        "top_n_sigma": 1.5,
        "logit_bias": {"17": -100, "4": 1.5},
        "allowed_token_ids": [4, 17, 2],
        "bad_words": ["a", " b c"],
        "max_completion_tokens": 5,
        "min_tokens": 2,
        "ignore_eos": True,
        "return_token_ids": True,
        "truncate_prompt_tokens": -1,
        "prompt_logprobs": 20,
        "stop": ["a", "b"],
        "seed": -(2**63),
        "n": 128,
        "logprobs": True,
        "top_logprobs": 20,
        "user": "u",
        "metadata": {"k": "v"},
    }
    messages = [
        {"role": "developer", "content": "d", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "content": "r", "tool_call_id": "c"},
    ]
    answer = await client.post(
        "/v1/chat/completions", json={"model": MODEL, "messages": messages, **fields}
    )
    text = chat_pb2.ContentPart

    assert answer.status_code == 200, answer.text
    assert backend.requests[0] == chat_request(
        model=MODEL,
        messages=[
            chat_pb2.ChatMessage(
                role=chat_pb2.ROLE_DEVELOPER, content=[text(text="d")], name="boss"
            ),
            chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content=[text(text="1"), text(text="2")]),
            chat_pb2.ChatMessage(
                role=chat_pb2.ROLE_ASSISTANT,
                tool_calls=[chat_pb2.ToolCall(id="c", name="f", arguments="{}")],
            ),
            chat_pb2.ChatMessage(
                role=chat_pb2.ROLE_TOOL, content=[text(text="r")], tool_call_id="c"
            ),
        ],
        **{**fields, "logit_bias": {17: -100, 4: 1.5}},
    )


@pytest.mark.parametrize("field", ["temperature", "seed", "stop", "n", "logit_bias", "stream"])
async def test_null_is_the_same_as_omitted(
    client: httpx.AsyncClient, backend: ScriptedBackend, field: str
) -> None:
    """`null` for an optional field is the same as omitting it."""
    await post(client)
    answer = await post(client, **{field: None})

    assert answer.status_code == 200
    assert backend.requests[0] == backend.requests[1]


async def test_zero_top_logprobs_without_logprobs(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """top_logprobs 0 without logprobs changes nothing."""
    await post(client)
    await post(client, logprobs=False, top_logprobs=0)
    backend.requests[1].ClearField("logprobs")

    assert backend.requests[0] == backend.requests[1]


async def test_max_tokens_is_an_alias(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """max_tokens alone, or with an equal max_completion_tokens, is the limit."""
    await post(client, max_tokens=3)
    await post(client, max_tokens=3, max_completion_tokens=3)

    assert [3, 3] == [request.options.max_completion_tokens for request in backend.requests]


async def test_models(client: httpx.AsyncClient) -> None:
    """Models are listed and can be retrieved one by one, even with a slash in the id."""
    listed = (await client.get("/v1/models")).json()
    one = (await client.get("/v1/models/org/other")).json()

    assert listed["object"] == "list"
    assert [MODEL, "org/other"] == [model["id"] for model in listed["data"]]
    assert one == {
        "id": "org/other",
        "object": "model",
        "created": 1_600_000_000,
        "owned_by": "trivium",
        "context_length": 2048,
        "max_model_len": 2048,
    }


async def test_request_ids(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """A valid request id is echoed and passed on with the trace; any other is replaced."""
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    sane = {"x-request-id": "order-17", "traceparent": trace}
    kept = await client.post("/v1/chat/completions", json=REQUEST, headers=sane)
    made = await client.get("/nowhere", headers={"x-request-id": "two words"})

    assert kept.headers["x-request-id"] == "order-17"
    assert backend.metadata[0]["x-request-id"] == "order-17"
    assert backend.metadata[0]["traceparent"] == trace
    assert made.headers["x-request-id"].startswith("req_")


async def test_an_answer_may_exceed_the_request_size_limit(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """Its length depends on the requested choices, tokens and log-probabilities."""
    text = "a" * 2**24
    texts = [delta(text, index=index, finish="LENGTH") for index in range(3)]
    backend.script = (header(), *texts, usage())
    answer = await post(client, n=3)

    assert 200 == answer.status_code
    assert [text] * 3 == [choice["message"]["content"] for choice in answer.json()["choices"]]
