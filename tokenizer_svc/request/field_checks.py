"""Checks of single values, with OpenAI's codes and wording.

Knows no requests: a field is its name in JSON, a value is a number, a text or a list.
"""

import math
from collections.abc import Sequence, Sized
from typing import Any

from trivium.limits import INT32_MAX, Range
from trivium.wire.errors import ServiceError


def missing(field: str) -> ServiceError:
    """The error for a required field that is absent."""
    return ServiceError(
        "missing_required_parameter", f"Missing required parameter: '{field}'.", field
    )


def check_integer(name: str, value: int | None, minimum: int, maximum: int = INT32_MAX) -> None:
    """Raises ServiceError unless `value` is absent or within the bounds."""
    if value is not None:
        check_number(name, value, Range(minimum, maximum))


def check_number(name: str, value: float, allowed: Range) -> None:
    """Raises ServiceError unless `value` is finite and within the range."""
    if not math.isfinite(value):
        text = f"Invalid '{name}': expected a finite number, but got {value} instead."
        raise ServiceError("invalid_value", text, name)
    if value in allowed:
        return
    kind = "integer" if isinstance(value, int) else "decimal"
    if allowed.is_below(value):
        sign = ">" if allowed.above_minimum else ">="
        code, fault, bound = "below_min", "below minimum", f"{sign} {allowed.minimum}"
    else:
        code, fault, bound = "above_max", "above maximum", f"<= {allowed.maximum}"
    text = (
        f"Invalid '{name}': {kind} {fault} value. "
        f"Expected a value {bound}, but got {value} instead."
    )
    raise ServiceError(f"{kind}_{code}_value", text, name)


def check_token_ids(name: str, token_ids: Sequence[int], vocabulary_size: int) -> None:
    """Raises ServiceError for the first id that is not in the vocabulary."""
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocabulary_size:
            field = f"{name}[{index}]"
            message = f"Invalid '{field}': {token_id} is not in the model's vocabulary."
            raise ServiceError("invalid_value", message, field)


def check_array(name: str, array: Sized, maximum: int) -> None:
    """Raises ServiceError if the list is too long."""
    if len(array) > maximum:
        text = (
            f"Invalid '{name}': array too long. Expected an array with maximum length "
            f"{maximum}, but got an array with length {len(array)} instead."
        )
        raise ServiceError("array_above_max_length", text, name)


def check_nonempty(name: str, array: Sized) -> None:
    """Raises ServiceError if the list is empty."""
    if not array:
        text = (
            f"Invalid '{name}': empty array. Expected an array with minimum length 1, "
            "but got an empty array instead."
        )
        raise ServiceError("empty_array", text, name)


def check_length(name: str, text: str, maximum: int) -> None:
    """Raises ServiceError if the text is too long."""
    if len(text) > maximum:
        message = (
            f"Invalid '{name}': string too long. Expected a string with maximum length "
            f"{maximum}, but got a string with length {len(text)} instead."
        )
        raise ServiceError("string_above_max_length", message, name)


def is_deeper(value: Any, levels: int) -> bool:
    """Whether parsed JSON is nested in more than so many levels of lists and objects."""
    rest = [(value, 1)]
    while rest:
        value, level = rest.pop()
        if isinstance(value, dict | list):
            if level > levels:
                return True
            inner = value.values() if isinstance(value, dict) else value
            rest.extend((item, level + 1) for item in inner)
    return False
