"""Tools, reasoning and response formats through the facade, as clients see them."""

import json
from typing import Any

import httpx
import pytest

from tests.completion_requests import chat_request
from tests.rest_facade.scripted_backend import (
    MODEL,
    ScriptedBackend,
    call,
    delta,
    header,
    logprob,
    usage,
)
from tests.rest_facade.test_facade_completion import chunks, post
from trivium.chat.v1 import chat_pb2

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {"type": "object", "properties": {"b": {}, "a": {"const": "é"}}},
        "strict": True,
    },
}
TWO_CALLS = (
    header(),
    delta(tool_calls=[call("weather", '{"city":')]),
    delta(tokens=2, tool_calls=[call(arguments='"Rome"}'), call("clock", position=1)]),
    delta(tokens=3, tool_calls=[call(arguments="{}", position=1)], finish="TOOL_CALLS"),
    usage(3),
)


def deltas(answer: httpx.Response) -> list[Any]:
    """The deltas and finish reasons of a stream with one choice."""
    choices = [chunk["choices"][0] for chunk in chunks(answer.text)[:-1]]
    return [(choice["delta"], choice["finish_reason"]) for choice in choices]


async def test_tool_calls(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """An answer that consists of calls has null content and finish reason tool_calls."""
    backend.script = TWO_CALLS
    answer = await post(client, tools=[WEATHER])
    choice = answer.json()["choices"][0]

    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "tool_calls": [
            {
                "id": "call_0",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city":"Rome"}'},
            },
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "clock", "arguments": "{}"},
            },
        ],
    }


async def test_streamed_tool_calls(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """Id, type and name come first, then the arguments in pieces, with the call's index."""
    backend.script = TWO_CALLS
    answer = await post(client, tools=[WEATHER], stream=True)

    def opened(index: int, name: str) -> dict[str, Any]:
        function = {"name": name, "arguments": ""}
        return {"index": index, "id": f"call_{index}", "type": "function", "function": function}

    def piece(index: int, arguments: str) -> dict[str, Any]:
        return {"index": index, "function": {"arguments": arguments}}

    assert deltas(answer) == [
        ({"role": "assistant", "content": None}, None),
        ({"tool_calls": [opened(0, "weather")]}, None),
        ({"tool_calls": [piece(0, '{"city":')]}, None),
        ({"tool_calls": [piece(0, '"Rome"}')]}, None),
        ({"tool_calls": [opened(1, "clock")]}, None),
        ({"tool_calls": [piece(1, "{}")]}, None),
        ({}, "tool_calls"),
    ]


async def test_content_before_a_call(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """Content before tool calls stays content."""
    backend.script = (
        header(),
        delta("Let me see."),
        delta(tool_calls=[call("clock", "{}")], finish="TOOL_CALLS"),
        usage(),
    )
    whole = await post(client, tools=[WEATHER])
    streamed = await post(client, tools=[WEATHER], stream=True)

    assert whole.json()["choices"][0]["message"]["content"] == "Let me see."
    assert [{"role": "assistant", "content": ""}, {"content": "Let me see."}] == [
        found for found, _ in deltas(streamed)[:2]
    ]


async def test_reasoning(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """Reasoning is separate from content in messages, deltas and usage."""
    backend.script = (
        header(),
        delta(reasoning_content="Hm"),
        delta("Yes", reasoning_content=".", tokens=3),
        delta(tokens=3, finish="STOP"),
        usage(3, reasoning_tokens=2),
    )
    whole = (await post(client)).json()
    streamed = await post(client, stream=True)

    assert whole["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Yes",
        "refusal": None,
        "annotations": [],
        "reasoning_content": "Hm.",
    }
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2
    assert [found for found, _ in deltas(streamed)] == [
        {"role": "assistant", "content": None},
        {"reasoning_content": "Hm"},
        {"reasoning_content": "."},
        {"content": "Yes"},
        {},
    ]


async def test_truncated_reasoning(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """If reasoning reaches the limit, content is null, streaming or not."""
    backend.script = (
        header(),
        delta(reasoning_content="Hm", finish="LENGTH"),
        usage(1, reasoning_tokens=1),
    )
    whole = (await post(client)).json()["choices"][0]
    streamed = await post(client, stream=True)

    assert (whole["message"]["content"], whole["finish_reason"]) == (None, "length")
    assert deltas(streamed)[0] == ({"role": "assistant", "content": None}, None)
    assert deltas(streamed)[-1] == ({}, "length")


async def test_logprobs_of_tokens_that_are_not_content(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """Every token's log-probability arrives once, even if the token is not content."""
    backend.script = (
        header(),
        delta(tool_calls=[call("clock", "{}")], logprobs=[logprob("{}")]),
        delta(logprobs=[logprob("\ufffd")], finish="TOOL_CALLS"),
        usage(),
    )
    answer = await post(client, tools=[WEATHER], stream=True, logprobs=True)
    found = [chunk["choices"][0]["logprobs"] for chunk in chunks(answer.text)[:-1]]

    assert ["{}", "\ufffd"] == [entry["content"][0]["token"] for entry in found if entry]


async def test_tools_are_passed_on(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """Tools and tool choices reach the next stage; schemas are text with their keys in order."""
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in (None, "none", "auto", "required", named):
        await post(client, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False)
    request = backend.requests[0]
    tool = request.tools[0].function
    modes = [chat_pb2.ToolChoiceMode.Name(r.tool_choice.mode)[17:] for r in backend.requests]

    assert (tool.name, tool.description, tool.strict) == ("weather", "Of a city.", True)
    assert list(json.loads(tool.parameters)["properties"]) == ["b", "a"]
    assert "é" in tool.parameters
    assert modes == ["UNSPECIFIED", "NONE", "AUTO", "REQUIRED", "FUNCTION"]
    assert not request.HasField("tool_choice")
    assert not request.parallel_tool_calls
    assert backend.requests[-1].tool_choice.function_name == "weather"


@pytest.mark.parametrize("mode", ["auto", "required"])
async def test_allowed_tools_are_passed_on(
    client: httpx.AsyncClient, backend: ScriptedBackend, mode: str
) -> None:
    """Of the tools listed only the names count; the request keeps all of its tools."""
    others = [{"type": "function", "function": {"name": name}} for name in ("time", "news")]
    allowed = {"mode": mode, "tools": [others[0], WEATHER]}
    answer = await post(
        client,
        tools=[WEATHER, *others],
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
    )
    [request] = backend.requests

    assert answer.status_code == 200, answer.text
    assert ["weather", "time", "news"] == [tool.function.name for tool in request.tools]
    assert chat_pb2.ToolChoiceMode.Name(request.tool_choice.mode).endswith(mode.upper())
    assert ["time", "weather"] == list(request.tool_choice.allowed_tools.function_names)


async def test_tools_without_a_type_are_functions(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """This is as in vLLM: Hugging Face's client omits the type of a choice."""
    tool = {"function": {"name": "weather"}}
    answer = await post(client, tools=[tool], tool_choice=tool)

    assert answer.status_code == 200, answer.text
    assert backend.requests[0].tools[0].function.name == "weather"
    assert backend.requests[0].tool_choice.function_name == "weather"


SCHEMA = {"type": "object", "required": ["z", "a"]}
SCHEMA_TEXT = '{"type":"object","required":["z","a"]}'


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"response_format": {"type": "text"}},
            {"response_format": {"text": {}}},
        ),
        (
            {"response_format": {"type": "json_object"}},
            {"response_format": {"json_object": {}}},
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "n",
                        "description": "d",
                        "schema": SCHEMA,
                        "strict": True,
                    },
                }
            },
            {
                "response_format": {
                    "json_schema": {
                        "name": "n",
                        "description": "d",
                        "schema": SCHEMA_TEXT,
                        "strict": True,
                    }
                }
            },
        ),
        *(
            (
                {"response_format": {"type": kind, name: SCHEMA}},
                {"response_format": {"json_schema": {"name": name, "schema": SCHEMA_TEXT}}},
            )
            for kind in ("json_object", "json_schema")
            for name in ("schema", "value")
        ),
        (
            {"response_format": {"type": "json_object", "schema": {}}},
            {"response_format": {"json_object": {}}},
        ),
        (
            {"structured_outputs": {"json": SCHEMA}},
            {"structured_outputs": {"json": SCHEMA_TEXT}},
        ),
        (
            {"structured_outputs": {"json": '{ "type":"string"}'}},
            {"structured_outputs": {"json": '{ "type":"string"}'}},
        ),
        (
            {"structured_outputs": {"regex": "a+"}},
            {"structured_outputs": {"regex": "a+"}},
        ),
        (
            {"structured_outputs": {"choice": ["a", "b"]}},
            {"structured_outputs": {"choice": {"choices": ["a", "b"]}}},
        ),
        (
            {"structured_outputs": {"grammar": "start: /a/"}},
            {"structured_outputs": {"grammar": "start: /a/"}},
        ),
        (
            {"structured_outputs": {"json_object": True, "regex": None}},
            {"structured_outputs": {"json_object": True}},
        ),
        ({"guided_json": SCHEMA}, {"structured_outputs": {"json": SCHEMA_TEXT}}),
        ({"guided_regex": "a+"}, {"structured_outputs": {"regex": "a+"}}),
        ({"guided_choice": ["a"]}, {"structured_outputs": {"choice": {"choices": ["a"]}}}),
        ({"guided_grammar": "start: /a/"}, {"structured_outputs": {"grammar": "start: /a/"}}),
        ({"regex": "a+"}, {"structured_outputs": {"regex": "a+"}}),
        ({"ebnf": 'root ::= "a"'}, {"structured_outputs": {"grammar": 'root ::= "a"'}}),
        ({"json_schema": SCHEMA}, {"structured_outputs": {"json": SCHEMA_TEXT}}),
        ({"json_schema": '{"type": "null"}'}, {"structured_outputs": {"json": '{"type": "null"}'}}),
        ({"json_schema": {}, "regex": None}, {}),
    ],
)
async def test_response_formats_are_passed_on(
    client: httpx.AsyncClient, backend: ScriptedBackend, fields: Any, expected: Any
) -> None:
    """Each response format reaches the next stage, under old and new names."""
    answer = await post(client, **fields)
    request = backend.requests[0]
    request.ClearField("model")
    request.ClearField("messages")

    assert answer.status_code == 200, answer.text
    assert request == chat_request(**expected)


async def test_chat_template_fields_are_passed_on(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """Fields for the chat template and the stop conditions reach the next stage."""
    await post(
        client,
        reasoning_effort="low",
        chat_template_kwargs={"enable_thinking": False, "x": {"b": 1, "a": None}},
        continue_final_message=True,
        add_generation_prompt=False,
        stop_token_ids=[2, 0],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
    )
    request = backend.requests[0]
    request.ClearField("model")
    request.ClearField("messages")

    assert request == chat_request(
        reasoning_effort="low",
        chat_template_kwargs={"enable_thinking": "false", "x": '{"b":1,"a":null}'},
        continue_final_message=True,
        add_generation_prompt=False,
        stop_token_ids=[2, 0],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
    )


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_reasoning_in_history(
    client: httpx.AsyncClient, backend: ScriptedBackend, name: str
) -> None:
    """Earlier reasoning may be sent back under either common name."""
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes", name: "Hm"},
        {"role": "user", "content": "Why?"},
    ]
    await post(client, messages=messages)

    assert backend.requests[0].messages[1].reasoning_content == "Hm"
    assert not backend.requests[0].messages[0].HasField("reasoning_content")


@pytest.mark.parametrize("arguments", ["", "{}", "null", '{"city": "Par', "[1]", "7", "no JSON"])
async def test_arguments_in_history(
    client: httpx.AsyncClient, backend: ScriptedBackend, arguments: str
) -> None:
    """They are passed on unchanged, as a model may have malformed them or a limit cut them off."""
    past = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [past]},
        {"role": "tool", "content": [{"type": "text", "text": "invalid"}], "tool_call_id": "c"},
    ]
    answer = await post(client, messages=messages)

    assert 200 == answer.status_code
    assert arguments == backend.requests[0].messages[1].tool_calls[0].arguments
    assert not backend.requests[0].messages[1].content


async def test_service_tier(client: httpx.AsyncClient) -> None:
    """Answers and chunks have the tier if the request has one."""
    silent = await post(client)
    whole = await post(client, service_tier="auto")
    streamed = await post(client, service_tier="auto", stream=True)

    assert "service_tier" not in silent.json()
    assert whole.json()["service_tier"] == "default"
    assert {"default"} == {chunk["service_tier"] for chunk in chunks(streamed.text)[:-1]}


async def test_an_answer_can_be_sent_back(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """An answer's message, including calls and reasoning, can be sent back unchanged."""
    backend.script = (header(), delta(reasoning_content="Hm"), *TWO_CALLS[1:])
    said = (await post(client, tools=[WEATHER])).json()["choices"][0]["message"]
    results = [
        {"role": "tool", "tool_call_id": made["id"], "content": "ok"} for made in said["tool_calls"]
    ]
    answer = await post(
        client,
        model=MODEL,
        messages=[{"role": "user", "content": "Hi"}, said, *results],
        tools=[WEATHER],
    )
    sent = backend.requests[1].messages

    assert answer.status_code == 200, answer.text
    assert [c.arguments for c in sent[1].tool_calls] == ['{"city":"Rome"}', "{}"]
    assert sent[1].reasoning_content == "Hm"
    assert [m.tool_call_id for m in sent[2:]] == ["call_0", "call_1"]
