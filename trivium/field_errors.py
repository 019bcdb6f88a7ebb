"""Errors for invalid request fields, with OpenAI's codes and messages, each written once.

`param` is the field's name in JSON, such as `messages[0].content`. Independent of request types.
"""

import math
from collections.abc import Sized
from typing import Literal

from trivium.limits import NAME_PATTERN, Range
from trivium.wire.errors import ServiceError

Noun = Literal["integer", "decimal"]
Sign = Literal["<=", ">=", ">"]


def missing(param: str) -> ServiceError:
    """For a missing required field."""
    return ServiceError(
        "missing_required_parameter", f"Missing required parameter: '{param}'.", param
    )


def contradiction(param: str, why: str) -> ServiceError:
    """For a field that contradicts another."""
    return ServiceError(
        "invalid_parameter_combination", f"The '{param}' parameter {why}", param=param
    )


def wrong_type(param: str, expected: str, got: str) -> ServiceError:
    """For a value of the wrong JSON type; types include their article. An empty `param` means the
    body."""
    field = f" for '{param}'" if param else ""
    message = f"Invalid type{field}: expected {expected}, but got {got} instead."
    return ServiceError("invalid_type", message, param or None)


def unknown_value(param: str, supported: str) -> ServiceError:
    """For a value that is not among those `supported`."""
    text = f"Invalid value for '{param}'. Supported values are: {supported}."
    return ServiceError("invalid_value", text, param)


def check_number(param: str, value: float, allowed: Range) -> None:
    """Raises ServiceError unless `value` is finite and within the range."""
    if not math.isfinite(value):
        text = f"Invalid '{param}': expected a finite number, but got {value} instead."
        raise ServiceError("invalid_value", text, param)
    if value in allowed:
        return
    noun: Noun = "integer" if isinstance(value, int) else "decimal"
    if allowed.is_below(value):
        sign: Sign = ">" if allowed.above_minimum else ">="
        raise out_of_range(param, noun, sign, allowed.minimum, value)
    raise out_of_range(param, noun, "<=", allowed.maximum, value)


def check_array(param: str, array: Sized, maximum: int) -> None:
    """Raises ServiceError if the list is too long."""
    if len(array) > maximum:
        raise array_too_long(param, maximum, len(array))


def check_nonempty(param: str, array: Sized) -> None:
    """Raises ServiceError if the list is empty."""
    if not array:
        raise empty_array(param)


def out_of_range(param: str, noun: Noun, sign: Sign, bound: object, value: object) -> ServiceError:
    """For a number that does not satisfy `sign` `bound`."""
    code, fault = ("above_max", "above maximum") if sign == "<=" else ("below_min", "below minimum")
    text = (
        f"Invalid '{param}': {noun} {fault} value. "
        f"Expected a value {sign} {bound}, but got {value} instead."
    )
    return ServiceError(f"{noun}_{code}_value", text, param)


def array_too_long(param: str, maximum: int, length: int) -> ServiceError:
    """For a list with more than `maximum` elements."""
    text = (
        f"Invalid '{param}': array too long. Expected an array with maximum length "
        f"{maximum}, but got an array with length {length} instead."
    )
    return ServiceError("array_above_max_length", text, param)


def empty_array(param: str) -> ServiceError:
    """For a list that needs at least one element."""
    text = (
        f"Invalid '{param}': empty array. Expected an array with minimum length 1, "
        "but got an empty array instead."
    )
    return ServiceError("empty_array", text, param)


def string_too_long(param: str, maximum: int, length: int) -> ServiceError:
    """For a string of more than `maximum` characters."""
    text = (
        f"Invalid '{param}': string too long. Expected a string with maximum length "
        f"{maximum}, but got a string with length {length} instead."
    )
    return ServiceError("string_above_max_length", text, param)


def empty_string(param: str, unit: str = "character") -> ServiceError:
    """For a string that needs at least one `unit`."""
    text = f"Invalid '{param}': empty string. Expected at least one {unit}."
    return ServiceError("invalid_value", text, param)


def too_many(param: str, maximum: int, what: str) -> ServiceError:
    """For the list that takes the number of `what` in a request over `maximum`."""
    message = f"Invalid '{param}': array too long. A request has at most {maximum} {what}."
    return ServiceError("array_above_max_length", message, param)


def too_many_entries(param: str, maximum: int) -> ServiceError:
    """For a map with more than `maximum` entries."""
    return ServiceError("invalid_value", f"Invalid '{param}': more than {maximum} entries.", param)


def malformed_name(param: str) -> ServiceError:
    """For a name that does not match NAME_PATTERN."""
    text = (
        f"Invalid '{param}': string does not match pattern. "
        f"Expected a string that matches the pattern '{NAME_PATTERN}'."
    )
    return ServiceError("invalid_value", text, param)


def choice_without_tools() -> ServiceError:
    """For a tool choice in a request without tools."""
    text = (
        "Invalid value for 'tool_choice': 'tool_choice' is only allowed when 'tools' are specified."
    )
    return ServiceError("invalid_parameter_combination", text, "tool_choice")


def unknown_tool(param: str, name: str) -> ServiceError:
    """For a tool choice that names none of the request's tools."""
    message = f"Tool choice '{name}' not found in 'tools' parameter."
    return ServiceError("invalid_value", message, param)


def duplicate_tool(param: str, name: str) -> ServiceError:
    """For a tool that is listed twice."""
    text = f"Invalid '{param}': there is another tool '{name}'."
    return ServiceError("invalid_value", text, param)


def unsupported_parameter(param: str, where: str) -> ServiceError:
    """For a field that is not supported `where`, such as "with this model"."""
    message = f"Unsupported parameter: '{param}' is not supported {where}."
    return ServiceError("unsupported_parameter", message, param)
