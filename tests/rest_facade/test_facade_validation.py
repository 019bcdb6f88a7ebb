"""Which requests are refused, and with which messages."""

import copy
from typing import Any

import pytest

from rest_facade.body import parse_json
from rest_facade.requests.chat import ChatCompletionRequest
from rest_facade.requests.validation import parse
from trivium.wire.errors import ServiceError

VALID: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
    ],
}


def refusal(raw: dict[str, Any]) -> ServiceError:
    """The error that `raw` is refused with."""
    with pytest.raises(ServiceError) as caught:
        parse(ChatCompletionRequest, raw)
    return caught.value


def test_missing_fields() -> None:
    """Absent required fields are named by their path."""
    assert refusal({"model": "m"}).message == "Missing required parameter: 'messages'."
    assert refusal({"messages": VALID["messages"]}).param == "model"
    assert refusal({"model": "m", "messages": [{"content": "x"}]}).param == "messages[0].role"
    assert refusal({"model": "m", "messages": [{"role": "user"}]}).param == "messages[0].content"


@pytest.mark.parametrize(
    ("fields", "code", "param", "message"),
    [
        (
            {"temperature": "1"},
            "invalid_type",
            "temperature",
            "Invalid type for 'temperature': expected a decimal, but got a string instead.",
        ),
        (
            {"temperature": True},
            "invalid_type",
            "temperature",
            "Invalid type for 'temperature': expected a decimal, but got a boolean instead.",
        ),
        (
            {"temperature": 3},
            "decimal_above_max_value",
            "temperature",
            "Invalid 'temperature': decimal above maximum value. "
            "Expected a value <= 2, but got 3 instead.",
        ),
        (
            {"top_p": -0.5},
            "decimal_below_min_value",
            "top_p",
            "Invalid 'top_p': decimal below minimum value. "
            "Expected a value >= 0, but got -0.5 instead.",
        ),
        (
            {"n": 0},
            "integer_below_min_value",
            "n",
            "Invalid 'n': integer below minimum value. Expected a value >= 1, but got 0 instead.",
        ),
        (
            {"n": 129},
            "integer_above_max_value",
            "n",
            "Invalid 'n': integer above maximum value. "
            "Expected a value <= 128, but got 129 instead.",
        ),
        (
            {"max_tokens": 1.0},
            "invalid_type",
            "max_tokens",
            "Invalid type for 'max_tokens': expected an integer, but got a decimal instead.",
        ),
        (
            {"stop": ["a", "b", "c", "d", "e"]},
            "array_above_max_length",
            "stop",
            "Invalid 'stop': array too long. Expected an array with maximum length 4, "
            "but got an array with length 5 instead.",
        ),
        (
            {"guided_json": "[]"},
            "invalid_json_schema",
            "guided_json",
            "Invalid 'guided_json': must be a string containing a JSON object.",
        ),
        (
            {"stop": 5},
            "invalid_type",
            "stop",
            "Invalid type for 'stop': expected one of a string or array of strings, "
            "but got an integer instead.",
        ),
        (
            {"messages": []},
            "empty_array",
            "messages",
            "Invalid 'messages': empty array. Expected an array with minimum length 1, "
            "but got an empty array instead.",
        ),
        (
            {"messages": None},
            "invalid_type",
            "messages",
            "Invalid type for 'messages': expected an array of objects, but got null instead.",
        ),
        (
            {"user": "x" * 513},
            "string_above_max_length",
            "user",
            "Invalid 'user': string too long. Expected a string with maximum length 512, "
            "but got a string with length 513 instead.",
        ),
    ],
)
def test_errors_have_openais_wording(
    fields: dict[str, Any], code: str, param: str, message: str
) -> None:
    """Errors have OpenAI's wording."""
    error = refusal(VALID | fields)

    assert (code, param, message) == (error.code, error.param, error.message)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"seed": 2**63}, "integer_above_max_value", "seed"),
        ({"seed": 10**4000}, "integer_above_max_value", "seed"),
        ({"temperature": 10**400}, "invalid_type", "temperature"),
        ({"repetition_penalty": 0}, "decimal_below_min_value", "repetition_penalty"),
        ({"top_k": -2}, "integer_below_min_value", "top_k"),
        ({"stop": ""}, "invalid_value", "stop[0]"),
        ({"stop": ["a", None]}, "invalid_type", "stop[1]"),
        ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"\uff12": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {str(2**31): 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"1": 101}}, "decimal_above_max_value", "logit_bias.1"),
        ({"metadata": {"a": 1}}, "invalid_type", "metadata.a"),
        ({"metadata": {str(i): "" for i in range(17)}}, "invalid_value", "metadata"),
        ({"metadata": {"a" * 65: ""}}, "string_above_max_length", "metadata"),
        ({"stream": 1}, "invalid_type", "stream"),
        ({"stream_options": {}}, "invalid_parameter_combination", "stream_options"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "invalid_parameter_combination",
            "stream_options.continuous_usage_stats",
        ),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "unsupported_value",
            "stream_options.include_obfuscation",
        ),
        (
            {"max_tokens": 1, "max_completion_tokens": 2},
            "invalid_parameter_combination",
            "max_tokens",
        ),
        ({"max_tokens": 1, "min_tokens": 2}, "invalid_parameter_combination", "min_tokens"),
        ({"top_logprobs": 1}, "invalid_parameter_combination", "top_logprobs"),
        ({"modalities": ["text", "audio"]}, "unsupported_value", "modalities[1]"),
        ({"best_of": True}, "unsupported_value", "best_of"),
        ({"prompt_logprobs": -1}, "integer_below_min_value", "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "integer_above_max_value", "prompt_logprobs"),
        ({"truncation_side": "right"}, "unsupported_value", "truncation_side"),
        ({"store": True}, "unsupported_value", "store"),
        ({"service_tier": "flex"}, "unsupported_value", "service_tier"),
        ({"service_tier": "first"}, "invalid_value", "service_tier"),
        ({"verbosity": "low"}, "unsupported_value", "verbosity"),
        ({"prediction": {"type": "content"}}, "unsupported_parameter", "prediction"),
        ({"audio": {"voice": "a"}}, "unsupported_parameter", "audio"),
        ({"web_search_options": {}}, "unsupported_parameter", "web_search_options"),
        ({"moderation": {"model": "m"}}, "unsupported_parameter", "moderation"),
        ({"prompt_cache_options": {}}, "unsupported_parameter", "prompt_cache_options"),
        ({"prompt_cache_key": 5}, "invalid_type", "prompt_cache_key"),
        ({"prompt_cache_retention": "24h"}, "unsupported_value", "prompt_cache_retention"),
        ({"safety_identifier": "x" * 513}, "string_above_max_length", "safety_identifier"),
        ({"functions": []}, "unsupported_parameter", "functions"),
        ({"function_call": "auto"}, "unsupported_parameter", "function_call"),
        ({"stop_token_ids": [-1]}, "integer_below_min_value", "stop_token_ids[0]"),
        ({"bad_words": "a"}, "invalid_type", "bad_words"),
        ({"bad_words": ["a", 5]}, "invalid_type", "bad_words[1]"),
        ({"bad_words": ["a" * 257]}, "string_above_max_length", "bad_words[0]"),
        ({"bad_words": ["a"] * 129}, "array_above_max_length", "bad_words"),
        ({"allowed_token_ids": []}, "empty_array", "allowed_token_ids"),
        ({"allowed_token_ids": [3, -1]}, "integer_below_min_value", "allowed_token_ids[1]"),
        ({"allowed_token_ids": [3.5]}, "invalid_type", "allowed_token_ids[0]"),
        ({"allowed_token_ids": 3}, "invalid_type", "allowed_token_ids"),
        ({"reasoning_effort": "max"}, "unsupported_value", "reasoning_effort"),
        ({"reasoning_effort": "much"}, "invalid_value", "reasoning_effort"),
        ({"chat_template_kwargs": []}, "invalid_type", "chat_template_kwargs"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "invalid_parameter_combination",
            "add_generation_prompt",
        ),
    ],
)
def test_refused_fields(fields: dict[str, Any], code: str, param: str) -> None:
    """Invalid, contradictory and unsupported fields are refused; the error names them."""
    error = refusal(VALID | fields)

    assert (code, param) == (error.code, error.param)


FUNCTION = {"type": "function", "function": {"name": "f"}}


def allowed(*tools: Any, mode: str = "auto") -> dict[str, Any]:
    """A request with one tool and a choice that allows these."""
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}
    return {"tools": [FUNCTION], "tool_choice": choice}


ALLOWED = "tool_choice.allowed_tools"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tools": [{}]}, "missing_required_parameter", "tools[0].function"),
        ({"tools": [{"type": "custom"}]}, "unsupported_value", "tools[0].type"),
        ({"tools": [{"type": "magic"}]}, "invalid_value", "tools[0].type"),
        (
            {"tools": [{"type": "function"}]},
            "missing_required_parameter",
            "tools[0].function",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "invalid_value",
            "tools[0].function.name",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a" * 65}}]},
            "string_above_max_length",
            "tools[0].function.name",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": "{}"}}]},
            "invalid_type",
            "tools[0].function.parameters",
        ),
        ({"tools": [FUNCTION, FUNCTION]}, "invalid_value", "tools[1].function.name"),
        ({"tools": [FUNCTION] * 129}, "array_above_max_length", "tools"),
        ({"tool_choice": "always"}, "invalid_value", "tool_choice"),
        ({"tool_choice": 5}, "invalid_type", "tool_choice"),
        ({"tool_choice": "required"}, "invalid_parameter_combination", "tool_choice"),
        (
            {"tool_choice": {"type": "custom", "custom": {"name": "f"}}},
            "unsupported_value",
            "tool_choice.type",
        ),
        ({"tool_choice": {"type": "allowed_tools"}}, "missing_required_parameter", ALLOWED),
        (
            {"tool_choice": allowed(FUNCTION)["tool_choice"] | FUNCTION},
            "invalid_parameter_combination",
            ALLOWED,
        ),
        (
            {"tool_choice": FUNCTION | allowed(FUNCTION)["tool_choice"]},
            "invalid_parameter_combination",
            "tool_choice.function",
        ),
        (allowed(FUNCTION) | {"tools": []}, "invalid_parameter_combination", "tool_choice"),
        (allowed(FUNCTION, mode="none"), "invalid_value", f"{ALLOWED}.mode"),
        (allowed(), "empty_array", f"{ALLOWED}.tools"),
        (allowed(*[FUNCTION] * 129), "array_above_max_length", f"{ALLOWED}.tools"),
        (allowed({"type": "custom"}), "unsupported_value", f"{ALLOWED}.tools[0].type"),
        (
            allowed(FUNCTION, {"type": "function", "name": "f"}),
            "missing_required_parameter",
            f"{ALLOWED}.tools[1].function",
        ),
        (
            allowed(FUNCTION, {"function": {"name": "g"}}),
            "invalid_value",
            f"{ALLOWED}.tools[1].function.name",
        ),
        (
            allowed(FUNCTION, FUNCTION),
            "invalid_value",
            f"{ALLOWED}.tools[1].function.name",
        ),
        (
            {"tool_choice": {"type": "function"}},
            "missing_required_parameter",
            "tool_choice.function",
        ),
        (
            {
                "tools": [FUNCTION],
                "tool_choice": {"type": "function", "function": {"name": "g"}},
            },
            "invalid_value",
            "tool_choice.function.name",
        ),
        ({"parallel_tool_calls": 1}, "invalid_type", "parallel_tool_calls"),
    ],
)
def test_refused_tools(fields: dict[str, Any], code: str, param: str) -> None:
    """Invalid tools are refused; the error names the exact field."""
    error = refusal(VALID | fields)

    assert (code, param) == (error.code, error.param)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"response_format": "json"}, "invalid_type", "response_format"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        ({"response_format": {"type": "grammar"}}, "unsupported_value", "response_format.type"),
        (
            {"response_format": {"type": "json_schema"}},
            "missing_required_parameter",
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "missing_required_parameter",
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "ü"}}},
            "invalid_value",
            "response_format.json_schema.name",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": "{}"},
                }
            },
            "invalid_type",
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "a"}}},
            "invalid_parameter_combination",
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_object", "schema": "{}"}},
            "invalid_type",
            "response_format.schema",
        ),
        (
            {"response_format": {"type": "text", "value": {}}},
            "invalid_parameter_combination",
            "response_format.value",
        ),
        (
            {"response_format": {"type": "json_object", "value": {}, "schema": {}}},
            "invalid_parameter_combination",
            "response_format.value",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a"},
                    "schema": {},
                }
            },
            "invalid_parameter_combination",
            "response_format.schema",
        ),
        ({"structured_outputs": {}}, "invalid_value", "structured_outputs"),
        (
            {"structured_outputs": {"json": "{", "regex": "a"}},
            "invalid_json_schema",
            "structured_outputs.json",
        ),
        ({"guided_json": "[]"}, "invalid_json_schema", "guided_json"),
        ({"json_schema": "[]"}, "invalid_json_schema", "json_schema"),
        ({"regex": 5}, "invalid_type", "regex"),
        ({"regex": "a", "ebnf": "b"}, "invalid_parameter_combination", "ebnf"),
        ({"guided_regex": "a", "regex": "a"}, "invalid_parameter_combination", "regex"),
        ({"stop_regex": "a"}, "unsupported_parameter", "stop_regex"),
        ({"return_hidden_states": True}, "unsupported_value", "return_hidden_states"),
        ({"guided_choice": []}, "empty_array", "guided_choice"),
        ({"guided_choice": [""]}, "invalid_value", "guided_choice[0]"),
        (
            {"structured_outputs": {"json": {}, "regex": "a"}},
            "invalid_parameter_combination",
            "structured_outputs.regex",
        ),
        (
            {"structured_outputs": {"json": {}}, "guided_regex": "a"},
            "invalid_parameter_combination",
            "guided_regex",
        ),
        (
            {"response_format": {"type": "json_object"}, "guided_regex": "a"},
            "invalid_parameter_combination",
            "guided_regex",
        ),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "unsupported_parameter",
            "structured_outputs.whitespace_pattern",
        ),
    ],
)
def test_refused_formats(fields: dict[str, Any], code: str, param: str) -> None:
    """Missing, invalid and conflicting constraints are refused; the error names the exact field."""
    error = refusal(VALID | fields)

    assert (code, param) == (error.code, error.param)


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        (5, "invalid_type", "messages[0]"),
        ({"role": "robot", "content": "x"}, "invalid_value", "messages[0].role"),
        ({"role": 5, "content": "x"}, "invalid_type", "messages[0].role"),
        ({"role": "function", "content": "x"}, "unsupported_value", "messages[0].role"),
        ({"role": "user", "content": 5}, "invalid_type", "messages[0].content"),
        ({"role": "user", "content": []}, "empty_array", "messages[0].content"),
        (
            {"role": "user", "content": None},
            "missing_required_parameter",
            "messages[0].content",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]},
            "unsupported_value",
            "messages[0].content[1].type",
        ),
        (
            {"role": "user", "content": [{"type": "smell"}]},
            "invalid_value",
            "messages[0].content[0].type",
        ),
        (
            {"role": "user", "content": [{"type": "text"}]},
            "missing_required_parameter",
            "messages[0].content[0].text",
        ),
        (
            {"role": "tool", "content": "x"},
            "missing_required_parameter",
            "messages[0].tool_call_id",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "c", "type": "function"}]},
            "missing_required_parameter",
            "messages[0].tool_calls[0].function",
        ),
        (
            {
                "role": "user",
                "content": "x",
                "tool_calls": [
                    {"id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
                ],
            },
            "invalid_value",
            "messages[0].tool_calls",
        ),
        (
            {"role": "user", "content": "x", "reasoning_content": "y"},
            "invalid_value",
            "messages[0].reasoning_content",
        ),
        (
            {"role": "assistant", "content": "x", "reasoning_content": "y", "reasoning": "z"},
            "invalid_parameter_combination",
            "messages[0].reasoning",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "c", "type": "custom"}]},
            "unsupported_value",
            "messages[0].tool_calls[0].type",
        ),
        (
            {"role": "assistant", "content": "x", "refusal": "no"},
            "unsupported_value",
            "messages[0].refusal",
        ),
        (
            {"role": "assistant", "audio": {"id": "a"}},
            "unsupported_parameter",
            "messages[0].audio",
        ),
        (
            {"role": "assistant", "function_call": {"name": "f"}},
            "unsupported_parameter",
            "messages[0].function_call",
        ),
    ],
)
def test_refused_messages(message: Any, code: str, param: str) -> None:
    """Invalid messages are refused; the error names the exact field."""
    error = refusal({"model": "m", "messages": [message]})

    assert (code, param) == (error.code, error.param)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"parallel_tool_calls": True},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"store": False},
        {"service_tier": "auto"},
        {"skip_special_tokens": True},
        {"length_penalty": 1.0},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"a_field_of_the_future": {"x": [1, 2]}},
        {"prompt_cache_key": "k", "safety_identifier": "s", "verbosity": "medium"},
        {"service_tier": "default"},
        {"temperature": 2, "top_p": 0, "top_logprobs": 0},
    ],
)
def test_harmless_fields(fields: dict[str, Any]) -> None:
    """Values that change nothing and unknown fields are accepted."""
    assert parse(ChatCompletionRequest, VALID | fields).model == "m"


def test_an_answer_can_be_sent_back() -> None:
    """An answer's message can be sent back as part of the conversation."""
    answer = {"role": "assistant", "content": "Hello", "refusal": None, "tool_calls": None}
    messages = [*VALID["messages"], answer]

    assert (
        parse(ChatCompletionRequest, VALID | {"messages": messages}).messages[-1].content
        is not None
    )


def test_parsing_does_not_modify_the_body() -> None:
    """Parsing does not modify the body."""
    raw = copy.deepcopy(VALID) | {"stop": "x", "tools": []}
    before = copy.deepcopy(raw)
    parse(ChatCompletionRequest, raw)

    assert raw == before


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{} {}",
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":1e400}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":01}',
        b'{"a":"\\ud800"}',
        b'{"\\udc00":1}',
        b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        b'{"a":' * 65 + b"1" + b"}" * 65,
        b'{"a":' + b"[" * 100_000,
    ],
)
def test_invalid_json(body: bytes) -> None:
    """Anything but strict JSON in UTF-8, with limited depth and numbers, is invalid_json."""
    with pytest.raises(ServiceError) as caught:
        parse_json(body)

    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"a": "\\ud83d"}', "a lone surrogate at line 1"),
        (b'{"a": "\\ude00"}', "lone leading surrogate in hex escape at line 1"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
    ],
)
def test_invalid_json_errors_state_the_cause(body: bytes, words: str) -> None:
    """Clients on Windows send a byte order mark, others an emoji cut in two; the error says so."""
    with pytest.raises(ServiceError, match=words):
        parse_json(body)


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"5", b"null", b"true"])
def test_json_other_than_an_object(body: bytes) -> None:
    """JSON other than an object is invalid_type."""
    with pytest.raises(ServiceError) as caught:
        parse_json(body)

    assert caught.value.code == "invalid_type"


def test_valid_json_is_accepted() -> None:
    """Depth up to 64, escaped astral characters, and repeated keys (the last wins) are accepted."""
    assert parse_json(b'{"a":' * 64 + b"1" + b"}" * 64)
    assert parse_json(b'{"a":"\\ud83e\\udee0"}') == {"a": "\U0001fae0"}
    assert parse_json(b'{"a":1,"a":2}') == {"a": 2}
