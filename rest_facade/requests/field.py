"""Building blocks of request models: strict types, errors in OpenAI's wording, JSON as text.

Knows nothing about endpoints.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError, from_json

from rest_facade.json_encoding import to_json
from trivium.field_errors import malformed_name
from trivium.limits import MAX_NAME_CHARACTERS, NAME_PATTERN, Range
from trivium.wire.errors import ServiceError

FIELD_ERROR = "field_error"
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")

Value = TypeVar("Value")


def field_error(code: str, message: str) -> PydanticCustomError:
    """An error with a code of `ERRORS`; `{param}` in `message` is replaced by the field's name.

    With `invalid_type`, the message is just the expected type.
    """
    return PydanticCustomError(FIELD_ERROR, "{message}", {"code": code, "message": message})


def field_error_of(error: ServiceError) -> PydanticCustomError:
    """Converts an error, with `{param}` for its param, for use in a field's validator."""
    return field_error(error.code, error.message)


class Strict(BaseModel):
    """An object whose values are not coerced to other types; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Body(Strict):
    """The whole body of a request."""

    def check(self, raw: Mapping[str, Any]) -> None:
        """Raises ServiceError for fields that contradict each other or are not supported."""


def _name(value: str) -> str:
    if not _NAME_CHARACTERS.issuperset(value) or not value:
        raise field_error_of(malformed_name("{param}"))
    return value


Name = Annotated[
    str,
    Field(max_length=MAX_NAME_CHARACTERS, json_schema_extra={"pattern": NAME_PATTERN}),
    AfterValidator(_name),
]
"""The name of a function or a schema."""


def _object_text(value: Any) -> str:
    if not isinstance(value, dict):
        raise field_error("invalid_type", "an object")
    return to_json(value)


def _object_or_text(value: Any) -> str:
    if not isinstance(value, str):
        return _object_text(value)
    try:
        parsed = from_json(value, allow_inf_nan=False)
    except ValueError as error:
        raise field_error(
            "invalid_json_schema", f"Invalid '{{param}}': not JSON: {error}."
        ) from None
    if not isinstance(parsed, dict):
        raise field_error(
            "invalid_json_schema", "Invalid '{param}': must be a string containing a JSON object."
        )
    return value


def within(allowed: Range) -> Any:
    """A range as a pydantic constraint, for Annotated."""
    if allowed.above_minimum:
        return Field(gt=allowed.minimum, le=allowed.maximum)
    return Field(ge=allowed.minimum, le=allowed.maximum)


ObjectText = Annotated[str, BeforeValidator(_object_text, json_schema_input_type=dict[str, Any])]
"""A JSON object, kept as text."""

SchemaText = Annotated[
    str, BeforeValidator(_object_or_text, json_schema_input_type=dict[str, Any] | str)
]
"""A JSON object or the text of one, kept as text."""

AnyText = Annotated[str, BeforeValidator(to_json, json_schema_input_type=Any)]
"""Any JSON value, kept as text."""


def reject_unsupported(*values: str) -> BeforeValidator:
    """Rejects `values`, which other servers support, as not supported by this one."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value in values:
            raise field_error(
                "unsupported_value",
                f"Unsupported value: '{{param}}' does not support '{value}' with this server.",
            )
        return value

    return BeforeValidator(check)
