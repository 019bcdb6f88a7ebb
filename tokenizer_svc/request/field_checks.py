"""Checks of single values; fields go by their names in JSON.

Knows nothing about requests.
"""

from collections.abc import Sequence
from typing import Any

from trivium.field_errors import check_number, string_too_long
from trivium.limits import Range
from trivium.wire.errors import ServiceError


def check_optional(name: str, value: float | None, allowed: Range) -> None:
    """Raises ServiceError unless `value` is absent or within the range."""
    if value is not None:
        check_number(name, value, allowed)


def check_token_ids(name: str, token_ids: Sequence[int], vocabulary_size: int) -> None:
    """Raises ServiceError for the first id that is not in the vocabulary."""
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocabulary_size:
            field = f"{name}[{index}]"
            message = f"Invalid '{field}': {token_id} is not in the model's vocabulary."
            raise ServiceError("invalid_value", message, field)


def check_length(name: str, text: str, maximum: int) -> None:
    """Raises ServiceError if the text is too long."""
    if len(text) > maximum:
        raise string_too_long(name, maximum, len(text))


def is_deeper(value: Any, levels: int) -> bool:
    """Whether parsed JSON nests lists and objects more than this many levels deep."""
    rest = [(value, 1)]
    while rest:
        value, level = rest.pop()
        if isinstance(value, dict | list):
            if level > levels:
                return True
            inner = value.values() if isinstance(value, dict) else value
            rest.extend((item, level + 1) for item in inner)
    return False
