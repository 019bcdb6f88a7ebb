"""Parsed JSON to validated requests; errors in OpenAI's wording, with the client's field names.

Knows nothing about HTTP.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rest_facade.requests.field import FIELD_ERROR, Body
from trivium.field_errors import (
    Noun,
    Sign,
    array_too_long,
    empty_array,
    missing,
    out_of_range,
    string_too_long,
    wrong_type,
)
from trivium.wire.errors import ServiceError

_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a decimal",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_ARRAYS_OF_OBJECTS = ("messages", "tool_calls", "tools")
# By pydantic's error type: the sign, and the bound's key in the error's context.
_BOUNDS: dict[str, tuple[Sign, str]] = {
    "greater_than_equal": (">=", "ge"),
    "greater_than": (">", "gt"),
    "less_than_equal": ("<=", "le"),
}
_MAX_SHOWN_CHARACTERS = 64


RequestBody = TypeVar("RequestBody", bound=Body)


def parse(kind: type[RequestBody], raw: dict[str, Any]) -> RequestBody:
    """Validates a JSON object as a request; raises ServiceError for the first invalid field."""
    try:
        request = kind.model_validate(raw)
    except ValidationError as error:
        raise _from_validation_error(error) from None
    request.check(raw)
    return request


@contextlib.contextmanager
def rename_error_params(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of the next stage get the client's field names; `names` maps theirs to ours."""
    try:
        yield
    except ServiceError as error:
        for theirs, ours in names.items():
            if error.param == theirs or (error.param or "").startswith(
                (f"{theirs}.", f"{theirs}[")
            ):
                param = ours + (error.param or "").removeprefix(theirs)
                message = error.message.replace(theirs, ours)
                raise ServiceError(error.code, message, param, error.retry_after) from None
        raise


def _from_validation_error(error: ValidationError) -> ServiceError:
    details = error.errors(include_url=False)[0]
    return _field_error(details, _param(details["loc"]))


def _field_error(details: ErrorDetails, param: str) -> ServiceError:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == FIELD_ERROR:
        if context["code"] == "invalid_type":
            return wrong_type(param, context["message"], _json_type(value))
        message = context["message"].replace("{param}", param, 1)
        return ServiceError(context["code"], message, param or None)
    if kind == "missing":
        return missing(param)
    if kind in _EXPECTED:
        expected = _EXPECTED[kind]
        if kind == "list_type" and param.rpartition(".")[2] in _ARRAYS_OF_OBJECTS:
            expected = "an array of objects"
        return wrong_type(param, expected, _json_type(value))
    if kind == "literal_error":
        supported = context["expected"]
        if not isinstance(value, str):
            return wrong_type(param, f"one of {supported}", _json_type(value))
        message = f"Invalid value: {_displayed(value)}. Supported values are: {supported}."
        return ServiceError("invalid_value", message, param)
    if kind in _BOUNDS:
        sign, key = _BOUNDS[kind]
        noun: Noun = "integer" if isinstance(context[key], int) else "decimal"
        return out_of_range(param, noun, sign, _displayed(context[key]), _displayed(value))
    if kind == "too_long":
        return array_too_long(param, context["max_length"], len(value))
    if kind == "too_short":
        return empty_array(param)
    if kind == "string_too_long":
        return string_too_long(param, context["max_length"], len(value))
    message = f"Invalid value for '{param}': {details['msg']}."
    return ServiceError("invalid_value", message, param or None)


def _param(location: tuple[int | str, ...]) -> str:
    """A field's path in OpenAI's notation, such as `messages[0].content`."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part[:_MAX_SHOWN_CHARACTERS]}" if text else part
    return text


def _json_type(value: Any) -> str:
    names = {
        str: "a string",
        bool: "a boolean",
        int: "an integer",
        float: "a decimal",
        list: "an array",
        dict: "an object",
        type(None): "null",
    }
    return names[type(value)]


def _displayed(value: Any) -> str:
    if isinstance(value, float) and value == math.trunc(value):
        value = int(value)
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else text[:_MAX_SHOWN_CHARACTERS] + "…"
