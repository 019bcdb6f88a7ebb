"""Checks a request against the ranges that chat.proto documents.

Raises ServiceError with OpenAI's codes and wording, `param` being the field's name in JSON.
Knows no protobuf, and leaves the generator's own limits to the generator.
"""

import math
from collections.abc import Sequence

from tokenizer_svc.request import ChatRequest, Message, Role, Sampling, ValidRequest
from trivium.wire.errors import ServiceError

MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 4096
MAX_N = 128
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 100


def validate(request: ChatRequest, vocabulary_size: int) -> ValidRequest:
    """The same request as a type that says it is right, or the first thing that is wrong."""
    check_messages(request.messages)
    _check_sampling(request.sampling, vocabulary_size)
    _check_integer("max_completion_tokens", request.max_completion_tokens, 1)
    _check_integer("min_tokens", request.min_tokens, 0)
    _check_integer("n", request.n, 1, MAX_N)
    _check_stop(request.stop)
    _check_integer("top_logprobs", request.top_logprobs, 0, MAX_TOP_LOGPROBS)
    if request.top_logprobs is not None and not request.logprobs:
        message = "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled."
        raise ServiceError("invalid_parameter_combination", message, "top_logprobs")
    longest, least = request.max_completion_tokens, request.min_tokens or 0
    if longest is not None and least > longest:
        message = f"'min_tokens' is {least}, more than 'max_completion_tokens', which is {longest}."
        raise ServiceError("invalid_parameter_combination", message, "min_tokens")
    return ValidRequest(
        messages=request.messages,
        sampling=request.sampling,
        max_completion_tokens=request.max_completion_tokens,
        min_tokens=request.min_tokens or 0,
        ignore_eos=bool(request.ignore_eos),
        stop=request.stop,
        n=1 if request.n is None else request.n,
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


def check_messages(messages: Sequence[Message]) -> None:
    """The part of `validate` that is about messages alone."""
    if not messages:
        text = (
            "Invalid 'messages': empty array. Expected an array with minimum length 1, "
            "but got an empty array instead."
        )
        raise ServiceError("empty_array", text, "messages")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")


def _check_message(message: Message, where: str) -> None:
    if message.role is None:
        roles = ", ".join(f"'{role.value}'" for role in Role)
        text = f"Invalid value for '{where}.role'. Supported values are: {roles}."
        raise ServiceError("invalid_value", text, f"{where}.role")
    for index, part in enumerate(message.parts):
        if part is None:
            field = f"{where}.content[{index}]"
            raise ServiceError("invalid_value", f"Invalid '{field}': only text is known.", field)
    if message.content is None and message.role is not Role.ASSISTANT:
        text = f"Invalid value for '{where}.content': expected a string, got null."
        raise ServiceError("invalid_value", text, f"{where}.content")
    if message.role is Role.TOOL and not message.tool_call_id:
        raise _missing(f"{where}.tool_call_id")
    if message.tool_calls and message.role is not Role.ASSISTANT:
        text = f"Invalid '{where}.tool_calls': only assistant messages have tool calls."
        raise ServiceError("invalid_parameter_combination", text, f"{where}.tool_calls")
    for index, call in enumerate(message.tool_calls):
        if not call.name:
            raise _missing(f"{where}.tool_calls[{index}].function.name")


def _check_sampling(sampling: Sampling, vocabulary_size: int) -> None:
    _check_decimal("temperature", sampling.temperature, 0, 2)
    _check_decimal("top_p", sampling.top_p, 0, 1)
    _check_integer("top_k", sampling.top_k, -1)
    _check_decimal("min_p", sampling.min_p, 0, 1)
    _check_decimal("presence_penalty", sampling.presence_penalty, -2, 2)
    _check_decimal("frequency_penalty", sampling.frequency_penalty, -2, 2)
    _check_decimal("repetition_penalty", sampling.repetition_penalty, 0, 10)
    if sampling.repetition_penalty == 0:
        text = (
            "Invalid 'repetition_penalty': decimal below minimum value. "
            "Expected a value > 0, but got 0.0 instead."
        )
        raise ServiceError("decimal_below_min_value", text, "repetition_penalty")
    for token_id, bias in sampling.logit_bias.items():
        if not 0 <= token_id < vocabulary_size:
            text = (
                f"Invalid key in 'logit_bias': {token_id}. "
                f"Expected a token id from 0 to {vocabulary_size - 1}."
            )
            raise ServiceError("invalid_value", text, "logit_bias")
        _check_decimal("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)


def _check_stop(stop: Sequence[str]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        text = (
            f"Invalid 'stop': array too long. Expected an array with maximum length "
            f"{MAX_STOP_STRINGS}, but got an array with length {len(stop)} instead."
        )
        raise ServiceError("array_above_max_length", text, "stop")
    for index, string in enumerate(stop):
        if not string:
            text = f"Invalid 'stop[{index}]': empty string. Expected at least one character."
            raise ServiceError("invalid_value", text, f"stop[{index}]")
        if len(string) > MAX_STOP_CHARACTERS:
            text = (
                f"Invalid 'stop[{index}]': string too long. Expected a string with maximum length "
                f"{MAX_STOP_CHARACTERS}, but got a string with length {len(string)} instead."
            )
            raise ServiceError("string_above_max_length", text, f"stop[{index}]")


def _check_integer(name: str, value: int | None, minimum: int, maximum: int | None = None) -> None:
    if value is not None:
        _check_range("integer", name, value, minimum, maximum)


def _check_decimal(name: str, value: float | None, minimum: int, maximum: int) -> None:
    if value is None:
        return
    if not math.isfinite(value):
        text = f"Invalid '{name}': expected a finite number, but got {value} instead."
        raise ServiceError("invalid_value", text, name)
    _check_range("decimal", name, value, minimum, maximum)


def _check_range(kind: str, name: str, value: float, minimum: int, maximum: int | None) -> None:
    if maximum is not None and value > maximum:
        fault, bound = "above maximum", f"<= {maximum}"
    elif value < minimum:
        fault, bound = "below minimum", f">= {minimum}"
    else:
        return
    text = (
        f"Invalid '{name}': {kind} {fault} value. "
        f"Expected a value {bound}, but got {value} instead."
    )
    code = f"{kind}_{'above_max' if fault.startswith('above') else 'below_min'}_value"
    raise ServiceError(code, text, name)


def _missing(field: str) -> ServiceError:
    return ServiceError(
        "missing_required_parameter", f"Missing required parameter: '{field}'.", field
    )
