"""Every way in which a request can be invalid: the error's code, its field, OpenAI's wording."""

import math
from base64 import b64encode
from typing import Any
from urllib.parse import quote

import grpc
import pytest

from tests.tokenizer_svc.conftest import Stage, user
from tests.tokenizer_svc.scripted_generator import code_of, finish, message_of, says, update
from trivium.chat.v1 import chat_pb2, model_pb2
from trivium.generator.v1 import generator_pb2
from trivium.tokenizer.v1 import tokenizer_pb2

TEXT = [chat_pb2.ContentPart(text="x")]
ABOVE, BELOW = "decimal_above_max_value", "decimal_below_min_value"
INTEGER_ABOVE, INTEGER_BELOW = "integer_above_max_value", "integer_below_min_value"

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"model": ""}, "missing_required_parameter", "model"),
    ({"messages": []}, "empty_array", "messages"),
    ({"temperature": 2.1}, ABOVE, "temperature"),
    ({"temperature": -0.1}, BELOW, "temperature"),
    ({"temperature": math.nan}, "invalid_value", "temperature"),
    ({"temperature": math.inf}, "invalid_value", "temperature"),
    ({"top_p": 1.1}, ABOVE, "top_p"),
    ({"top_p": -0.1}, BELOW, "top_p"),
    ({"top_p": -math.inf}, "invalid_value", "top_p"),
    ({"top_k": -2}, INTEGER_BELOW, "top_k"),
    ({"min_p": 1.5}, ABOVE, "min_p"),
    ({"min_p": -1.0}, BELOW, "min_p"),
    ({"presence_penalty": 2.5}, ABOVE, "presence_penalty"),
    ({"presence_penalty": -2.5}, BELOW, "presence_penalty"),
    ({"frequency_penalty": 2.5}, ABOVE, "frequency_penalty"),
    ({"frequency_penalty": -2.5}, BELOW, "frequency_penalty"),
    ({"repetition_penalty": 10.5}, ABOVE, "repetition_penalty"),
    ({"repetition_penalty": 0.0}, BELOW, "repetition_penalty"),
    ({"repetition_penalty": -1.0}, BELOW, "repetition_penalty"),
    ({"top_n_sigma": 100.5}, ABOVE, "top_n_sigma"),
    ({"top_n_sigma": -1.5}, BELOW, "top_n_sigma"),
    ({"logit_bias": {512: 1.0}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {-1: 1.0}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {3: 100.5}}, ABOVE, "logit_bias"),
    ({"logit_bias": {3: -100.5}}, BELOW, "logit_bias"),
    ({"logit_bias": {3: math.nan}}, "invalid_value", "logit_bias"),
    ({"max_completion_tokens": 0}, INTEGER_BELOW, "max_completion_tokens"),
    ({"min_tokens": -1}, INTEGER_BELOW, "min_tokens"),
    ({"min_tokens": 9, "max_completion_tokens": 8}, "invalid_parameter_combination", "min_tokens"),
    ({"n": 0}, INTEGER_BELOW, "n"),
    ({"n": 129}, INTEGER_ABOVE, "n"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "array_above_max_length", "stop"),
    ({"stop": ["a", ""]}, "invalid_value", "stop[1]"),
    ({"stop": ["a" * 4097]}, "string_above_max_length", "stop[0]"),
    ({"logprobs": True, "top_logprobs": 21}, INTEGER_ABOVE, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, INTEGER_BELOW, "top_logprobs"),
    ({"top_logprobs": 1}, "invalid_parameter_combination", "top_logprobs"),
]

WRONG_MESSAGES: list[tuple[dict[str, Any], str, str]] = [
    ({"content": TEXT}, "invalid_value", "role"),
    ({"role": 17, "content": TEXT}, "invalid_value", "role"),
    ({"role": chat_pb2.ROLE_USER}, "missing_required_parameter", "content"),
    ({"role": chat_pb2.ROLE_SYSTEM}, "missing_required_parameter", "content"),
    ({"role": chat_pb2.ROLE_USER, "content": [{}]}, "invalid_value", "content[0]"),
    ({"role": chat_pb2.ROLE_TOOL, "content": TEXT}, "missing_required_parameter", "tool_call_id"),
    (
        {"role": chat_pb2.ROLE_USER, "content": TEXT, "tool_calls": [{"name": "f"}]},
        "invalid_value",
        "tool_calls",
    ),
    (
        {"role": chat_pb2.ROLE_ASSISTANT, "tool_calls": [{"id": "c"}]},
        "missing_required_parameter",
        "tool_calls[0].function.name",
    ),
]


async def refusal(stage: Stage, **fields: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stage.chat.CreateChatCompletion(stage.request(**fields))
    return refused.value


@pytest.mark.parametrize(("fields", "code", "param"), WRONG)
async def test_invalid_fields(stage: Stage, fields: dict[str, Any], code: str, param: str) -> None:
    """Each is INVALID_ARGUMENT with its code and field, and the generator is not called."""
    error = await refusal(stage, **fields)

    assert (code, param) == code_of(error)
    assert grpc.StatusCode.INVALID_ARGUMENT is error.code()
    assert [] == stage.generator.calls


@pytest.mark.parametrize(("message", "code", "param"), WRONG_MESSAGES)
async def test_invalid_messages(
    stage: Stage, message: dict[str, Any], code: str, param: str
) -> None:
    """The field names the message and the part of it that is wrong."""
    messages = [user("fine"), chat_pb2.ChatMessage(**message)]

    assert (code, f"messages[1].{param}") == code_of(await refusal(stage, messages=messages))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"temperature": 3.0},
            "Invalid 'temperature': decimal above maximum value. "
            "Expected a value <= 2, but got 3.0 instead.",
        ),
        (
            {"n": 0},
            "Invalid 'n': integer below minimum value. Expected a value >= 1, but got 0 instead.",
        ),
        ({"model": "gpt-5"}, "The model `gpt-5` does not exist."),
    ],
)
async def test_errors_have_openais_wording(
    stage: Stage, fields: dict[str, Any], words: str
) -> None:
    """Client libraries show these messages to people."""
    assert words == (await refusal(stage, **fields)).details()


async def test_unknown_enum_values_are_told_the_known_ones(stage: Stage) -> None:
    """By their names in the protocol: what a dynamic client cannot map arrives as 0."""
    role = await refusal(stage, messages=[chat_pb2.ChatMessage(content=TEXT)])
    mode = await refusal(stage, tool_choice={"mode": 17})

    assert "'ROLE_SYSTEM', 'ROLE_DEVELOPER', 'ROLE_USER'" in (role.details() or "")
    assert "'TOOL_CHOICE_MODE_NONE', 'TOOL_CHOICE_MODE_AUTO'" in (mode.details() or "")


async def test_an_unknown_model(stage: Stage) -> None:
    """Every service answers NOT_FOUND."""
    errors = [await refusal(stage, model="other")]
    for call in (
        stage.tokenizer.Tokenize(tokenizer_pb2.TokenizeRequest(model="other", text="x")),
        stage.models.GetModel(model_pb2.GetModelRequest(id="other")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        errors.append(refused.value)

    assert {"model_not_found"} == {code_of(error)[0] for error in errors}
    assert {grpc.StatusCode.NOT_FOUND} == {error.code() for error in errors}


@pytest.mark.parametrize("character", ["x", "%", "日", "🙂", "\x01"])
async def test_a_long_name_does_not_change_the_error(stage: Stage, character: str) -> None:
    """Errors quote the caller's text, shortened so that they reach the caller, in any script."""
    name = character * 5000
    error = await refusal(stage, model=name)
    unknown = await refusal(stage, chat_template_kwargs={name: "1"})

    assert ("model_not_found", "model") == code_of(error)
    assert f"`{character * 100}" in (error.details() or "")
    assert "unsupported_parameter" == code_of(unknown)[0]
    assert (code_of(unknown)[1] or "").startswith(f"chat_template_kwargs.{character}")


@pytest.mark.parametrize("character", ["x", "日"])
async def test_the_longest_error_fits_8_kib_of_headers(stage: Stage, character: str) -> None:
    """grpc-java takes no more of an answer's headers: it would see INTERNAL without a reason. A
    KiB is left for what proxies add."""
    request = stage.request(chat_template_kwargs={character * 5000: "not JSON"})
    call = stage.chat.CreateChatCompletion(request, metadata=(("x-request-id", "i" * 128),))
    status, message = await call.code(), quote(await call.details())
    wire = {":status": "200", "content-type": "application/grpc", "grpc-message": message}
    wire |= {"grpc-status": str(status.value[0]), "grpc-retry-pushback-ms": "-1"}
    for name, value in await call.trailing_metadata():
        wire[name] = b64encode(value).decode() if isinstance(value, bytes) else value

    assert grpc.StatusCode.INVALID_ARGUMENT is status
    assert {"grpc-status-details-bin", "x-request-id"} <= set(wire)
    assert sum(len(name) + len(value) + 32 for name, value in wire.items()) <= 7 * 1024


async def test_range_bounds_are_inclusive(stage: Stage) -> None:
    """Both ends of a range belong to it."""
    answer = message_of(update(0, [2]), finish(0, generator_pb2.FINISH_REASON_STOP_TOKEN, 1))
    stage.generator.script = says([answer])
    low: dict[str, Any] = {"temperature": 0.0, "top_p": 0.0, "top_k": -1, "min_p": 0.0}
    low |= {"presence_penalty": -2.0, "frequency_penalty": -2.0, "repetition_penalty": 0.01}
    low |= {"min_tokens": 0, "n": 1, "max_completion_tokens": 1, "seed": -(2**63)}
    high: dict[str, Any] = {"temperature": 2.0, "top_p": 1.0, "top_k": 2**31 - 1, "min_p": 1.0}
    high |= {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 10.0}
    high |= {"stop": ["a"] * 4, "logprobs": True, "top_logprobs": 20, "seed": 2**63 - 1}
    await stage.stream(**low, logit_bias={0: -100.0})
    await stage.stream(**high, logit_bias={511: 100.0})

    assert 2 == len(stage.generator.calls)


async def test_only_an_assistants_content_may_be_null(stage: Stage) -> None:
    """Only an assistant's content may be null."""
    answer = message_of(update(0, [2]), finish(0, generator_pb2.FINISH_REASON_STOP_TOKEN, 1))
    stage.generator.script = says([answer])

    assert await stage.stream(messages=[chat_pb2.ChatMessage(role=chat_pb2.ROLE_ASSISTANT)])
