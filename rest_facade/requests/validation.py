"""From parsed JSON to a validated request; errors in OpenAI's words, with the client's field names.

Knows nothing of HTTP.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rest_facade.requests.field import FIELD_ERROR, Body
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
_BOUNDS = {
    "greater_than_equal": ("below_min_value", "below minimum value", ">=", "ge"),
    "greater_than": ("below_min_value", "below minimum value", ">", "gt"),
    "less_than_equal": ("above_max_value", "above maximum value", "<=", "le"),
}
_MAX_SHOWN_CHARACTERS = 64


RequestBody = TypeVar("RequestBody", bound=Body)


def parse(kind: type[RequestBody], raw: dict[str, Any]) -> RequestBody:
    """A JSON object as a request; raises ServiceError for the first invalid field."""
    try:
        request = kind.model_validate(raw)
    except ValidationError as error:
        raise _from_validation_error(error) from None
    request.check(raw)
    return request


@contextlib.contextmanager
def rename_error_params(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of the next stage name fields as the client did: by `names`, from theirs to ours."""
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
    param = _param(details["loc"])
    code, message = _code_and_message(details, param)
    return ServiceError(code, message, param or None)


def _code_and_message(details: ErrorDetails, param: str) -> tuple[str, str]:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == FIELD_ERROR:
        if context["code"] == "invalid_type":
            return _wrong_type(param, context["message"], value)
        return context["code"], context["message"].replace("{param}", param, 1)
    if kind == "missing":
        return "missing_required_parameter", f"Missing required parameter: '{param}'."
    if kind in _EXPECTED:
        expected = _EXPECTED[kind]
        if kind == "list_type" and param.rpartition(".")[2] in _ARRAYS_OF_OBJECTS:
            expected = "an array of objects"
        return _wrong_type(param, expected, value)
    if kind == "literal_error":
        if not isinstance(value, str):
            return _wrong_type(param, f"one of {context['expected']}", value)
        return "invalid_value", (
            f"Invalid value: {_shown(value)}. Supported values are: {context['expected']}."
        )
    if kind in _BOUNDS:
        return _out_of_bounds(kind, param, value, context)
    if kind in ("too_long", "too_short", "string_too_long"):
        return _wrong_length(kind, param, value, context)
    return "invalid_value", f"Invalid value for '{param}': {details['msg']}."


def _wrong_type(param: str, expected: str, value: Any) -> tuple[str, str]:
    field = f" for '{param}'" if param else ""
    got = f"expected {expected}, but got {_json_type(value)} instead."
    return "invalid_type", f"Invalid type{field}: {got}"


def _out_of_bounds(
    kind: str, param: str, value: Any, context: Mapping[str, Any]
) -> tuple[str, str]:
    suffix, words, sign, key = _BOUNDS[kind]
    bound = context[key]
    noun = "integer" if isinstance(bound, int) else "decimal"
    limit = f"Expected a value {sign} {_shown(bound)}, but got {_shown(value)} instead."
    return f"{noun}_{suffix}", f"Invalid '{param}': {noun} {words}. {limit}"


def _wrong_length(kind: str, param: str, value: Any, context: Mapping[str, Any]) -> tuple[str, str]:
    if kind == "too_short":
        return "empty_array", (
            f"Invalid '{param}': empty array. Expected an array with minimum length "
            f"{context['min_length']}, but got an empty array instead."
        )
    noun, article = ("array", "an") if kind == "too_long" else ("string", "a")
    return f"{noun}_above_max_length", (
        f"Invalid '{param}': {noun} too long. Expected {article} {noun} with maximum length "
        f"{context['max_length']}, but got {article} {noun} with length {len(value)} instead."
    )


def _param(location: tuple[int | str, ...]) -> str:
    """`messages[0].content`, as OpenAI writes the path of a field."""
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


def _shown(value: Any) -> str:
    if isinstance(value, float) and value == math.trunc(value):
        value = int(value)
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else text[:_MAX_SHOWN_CHARACTERS] + "…"
