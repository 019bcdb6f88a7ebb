"""Plain completions through the facade, as clients see them."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from rest_facade.requests.completion import TextCompletionRequest
from rest_facade.requests.validation import parse
from tests.completion_requests import options
from tests.event_loop import stall
from tests.rest_facade.scripted_backend import (
    MODEL,
    SCORED,
    SCORED_JSON,
    ScriptedBackend,
    header,
    logprob,
    text_delta,
    text_logprob,
    usage,
)
from tests.rest_facade.test_facade_completion import USAGE, chunks
from trivium.chat.v1 import completion_pb2
from trivium.wire.errors import ServiceError

URL = "/v1/completions"


async def post(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post(URL, json={"model": MODEL, "prompt": "Say", **fields})


async def test_non_streaming_completion(client: httpx.AsyncClient) -> None:
    """An answer without `stream` is OpenAI's text_completion, field by field."""
    answer = await post(client)

    assert answer.status_code == 200
    assert answer.json() == {
        "id": "cmpl-" + "0" * 32,
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": MODEL,
        "system_fingerprint": "fp_scripted",
        "choices": [{"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
    }


async def test_streaming_completion(client: httpx.AsyncClient) -> None:
    """A stream is text, one finish chunk, the usage if requested, and [DONE]."""
    answer = await post(client, stream=True, stream_options={"include_usage": True})
    *events, last, done = chunks(answer.text)

    assert done == "[DONE]"
    assert [("Hello", None), (" world", None), ("", "stop")] == [
        (event["choices"][0]["text"], event["choices"][0]["finish_reason"]) for event in events
    ]
    assert {"text_completion"} == {event["object"] for event in events}
    assert (last["choices"], last["usage"]) == ([], USAGE)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", ""], ["a", ""]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
async def test_all_forms_of_prompts_are_passed_on(
    client: httpx.AsyncClient, backend: ScriptedBackend, prompt: Any, expected: Any
) -> None:
    """A prompt may be a text, a list of texts, token ids, or a list of those."""
    answer = await post(client, prompt=prompt)
    prompts = backend.requests[0].prompts

    assert answer.status_code == 200, answer.text
    assert expected == [
        p.text if p.WhichOneof("prompt") == "text" else list(p.token_ids.ids) for p in prompts
    ]


async def test_every_completion_field_is_passed_on(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """Each field of the request reaches the next stage with its value."""
    same = {
        "temperature": 0,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.05,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repetition_penalty": 1.1,
        "top_n_sigma": 1.5,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop": ["a", "b"],
        "stop_token_ids": [7],
        "allowed_token_ids": [7, 4],
        "return_token_ids": True,
        "truncate_prompt_tokens": 9,
        "prompt_logprobs": 0,
        "bad_words": ["a", " b c"],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "seed": 3,
        "n": 2,
        "user": "u",
    }
    regex = {"structured_outputs": {"regex": "a+"}}
    own = {"echo": True, "logprobs": 5, "add_special_tokens": False}
    await post(client, **same, **regex, **own, max_tokens=5, logit_bias={"4": 1})
    await post(client, max_completion_tokens=5, max_tokens=5)
    await post(client, max_tokens=0)

    assert backend.requests[0] == completion_pb2.CreateCompletionRequest(
        model=MODEL,
        prompts=[completion_pb2.Prompt(text="Say")],
        options=options(**same, **regex, max_completion_tokens=5, logit_bias={4: 1}),
        **own,
    )
    assert 5 == backend.requests[1].options.max_completion_tokens
    assert options(max_completion_tokens=0) == backend.requests[2].options


async def test_omitted_completion_fields_stay_unset(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """No values are invented for omitted fields, and `null` is the same as omitting them."""
    await post(client)
    await post(client, max_tokens=None, logprobs=None, suffix=None, best_of=None, echo=None)

    assert backend.requests[0] == completion_pb2.CreateCompletionRequest(
        model=MODEL,
        prompts=[completion_pb2.Prompt(text="Say")],
        options=options(),
    )
    assert backend.requests[0] == backend.requests[1]


async def test_completion_logprobs(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """The legacy format has parallel arrays; the sampled token is always among the top_logprobs."""
    part = logprob("\ufffd", -1.5)
    part.bytes = b"\xf0\x9f"
    part.top_logprobs[0].token, part.top_logprobs[0].bytes = "b", b"b"
    tokens = [text_logprob(None, 0), text_logprob(logprob("a"), 3), text_logprob(part, 4)]
    backend.text_script = (
        header(),
        text_delta("Saya", logprobs=tokens),
        text_delta(finish="LENGTH"),
        usage(),
    )
    expected = {
        "tokens": ["Say", "a", r"bytes:\xf0\x9f"],
        "token_logprobs": [None, -0.5, -1.5],
        "top_logprobs": [None, {"a": -0.5}, {"b": -1.5, r"bytes:\xf0\x9f": -1.5}],
        "text_offset": [0, 3, 4],
    }
    whole = await post(client, echo=True, logprobs=1)
    streamed = await post(client, echo=True, logprobs=1, stream=True)

    assert whole.json()["choices"][0]["logprobs"] == expected
    assert [expected, None] == [
        chunk["choices"][0]["logprobs"] for chunk in chunks(streamed.text)[:-1]
    ]


async def test_token_ids_of_completions(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """With return_token_ids each choice has its prompt's tokens and its own; in a stream its first
    chunk has the prompt's, even if there is no text yet, and every chunk its own."""
    backend.text_script = (
        header([5], [6, 7]),
        text_delta(index=0, tokens=0),
        text_delta("a", index=0, tokens=1, token_ids=[1]),
        text_delta("b", index=3, tokens=1, token_ids=[2]),
        text_delta(index=0, tokens=2, token_ids=[3]),
        text_delta("c", index=0, tokens=3, token_ids=[4], finish="LENGTH"),
        text_delta(index=3, tokens=2, token_ids=[9], finish="STOP"),
        usage(5),
    )
    fields = {"prompt": ["a", "b"], "n": 2, "return_token_ids": True}
    whole = (await post(client, **fields)).json()["choices"]
    streamed = chunks((await post(client, **fields, stream=True)).text)[:-1]
    found = [chunk["choices"][0] for chunk in streamed]

    assert [([5], [1, 3, 4]), ([6, 7], [2, 9])] == [
        (choice["prompt_token_ids"], choice["token_ids"]) for choice in whole
    ]
    assert [
        (0, "", [5], []),
        (0, "a", None, [1]),
        (3, "b", [6, 7], [2]),
        (0, "", None, [3]),
        (0, "c", None, [4]),
        (0, "", None, []),
        (3, "", None, [9]),
    ] == [(c["index"], c["text"], c.get("prompt_token_ids"), c["token_ids"]) for c in found]


async def test_prompt_logprobs_of_completions(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """With prompt_logprobs each choice has those of its prompt, in the same form as a chat."""
    backend.prompt_logprobs = SCORED
    backend.text_script = (
        header(),
        text_delta("a", index=0, finish="STOP"),
        text_delta("b", index=1, finish="STOP"),
        usage(2),
    )
    choices = (await post(client, prompt_logprobs=1, n=2)).json()["choices"]

    assert [SCORED_JSON] * 2 == [choice["prompt_logprobs"] for choice in choices]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": None}, "invalid_type", "prompt"),
        ({"prompt": 5}, "invalid_type", "prompt"),
        ({"prompt": []}, "empty_array", "prompt"),
        ({"prompt": [[]]}, "empty_array", "prompt[0]"),
        ({"prompt": ["a", 5]}, "invalid_type", "prompt[1]"),
        ({"prompt": [1, "a"]}, "invalid_type", "prompt[0]"),
        ({"prompt": [True]}, "invalid_type", "prompt[0]"),
        ({"prompt": [-1]}, "invalid_value", "prompt[0]"),
        ({"prompt": ["a"] * 129}, "array_above_max_length", "prompt"),
        ({"max_tokens": -1}, "integer_below_min_value", "max_tokens"),
        ({"logprobs": 6}, "integer_above_max_value", "logprobs"),
        ({"logprobs": True}, "invalid_type", "logprobs"),
        ({"suffix": "x"}, "unsupported_value", "suffix"),
        ({"best_of": 2}, "unsupported_value", "best_of"),
        (
            {"max_completion_tokens": 2, "max_tokens": 3},
            "invalid_parameter_combination",
            "max_tokens",
        ),
        ({"max_tokens": 2, "min_tokens": 3}, "invalid_parameter_combination", "min_tokens"),
        ({"stream_options": {}}, "invalid_parameter_combination", "stream_options"),
        ({"messages": []}, "unsupported_parameter", "messages"),
    ],
)
def test_refused_completion_fields(fields: dict[str, Any], code: str, param: str) -> None:
    """Invalid, contradictory and unsupported fields are refused; the error names them."""
    with pytest.raises(ServiceError) as caught:
        parse(TextCompletionRequest, {"model": "m", "prompt": "a"} | fields)

    assert (code, param) == (caught.value.code, caught.value.param)


def test_errors_list_the_supported_values() -> None:
    """For a field with only some supported values, the error lists them."""
    with pytest.raises(ServiceError, match="'best_of' supports only 1 with this server"):
        parse(TextCompletionRequest, {"model": "m", "prompt": "a", "best_of": 2})


async def test_completion_errors(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """Failures before and during a stream are OpenAI's errors, as in chat."""
    backend.text_script = (ServiceError("context_length_exceeded", "Too long.", "prompt"),)
    early = await post(client, stream=True)
    whole = await post(client)
    gone = ServiceError("backend_unavailable", "It is gone.")
    backend.text_script = (header(), text_delta("He"), gone)
    late = await post(client, stream=True)

    assert [400, 400] == [answer.status_code for answer in (early, whole)]
    assert early.json()["error"]["param"] == "prompt"
    assert '"code":"backend_unavailable"' in late.text.split("\n\n")[-2]


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_long_echo_does_not_block_the_event_loop(
    client: httpx.AsyncClient, backend: ScriptedBackend, streamed: bool
) -> None:
    """Serializing a long echo's log-probabilities does not block the event loop."""
    entries = [text_logprob(logprob("a"), place) for place in range(100_000)]
    backend.text_script = (
        header(),
        text_delta("a" * len(entries), logprobs=entries),
        text_delta(tokens=2, finish="STOP"),
        usage(),
    )
    assert await share_stalled(client, logprobs=1, stream=streamed) < 0.5


@pytest.mark.slow
async def test_many_copies_of_a_prompt_do_not_block_the_event_loop(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """A prompt's token ids, which each of its choices has in JSON, are serialized elsewhere."""
    choices = [text_delta(index=index, finish="STOP") for index in range(128)]
    backend.text_script = (header([1000] * 20_000), *choices, usage())

    assert await share_stalled(client, return_token_ids=True, n=128) < 0.5


async def share_stalled(client: httpx.AsyncClient, **fields: Any) -> float:
    """The longest time for which a request blocks the event loop, as a share of the whole."""
    body = json.dumps({"model": MODEL, "prompt": "Say", **fields})
    head = f"POST {URL} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    head += f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    # No client library, which would parse the answer in this process.
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    writer.write((head + body).encode())
    answer = asyncio.create_task(reader.read())
    share = await stall(answer)
    writer.close()

    assert answer.result().startswith(b"HTTP/1.1 200")
    return share
