"""JSON Schemas as text: whether they are JSON at all, and how they stand inside of a grammar.

Whether a schema can be compiled is the generator's to say.
"""

import json
from typing import Any

from trivium.wire.errors import ServiceError

MAX_SCHEMA_CHARACTERS = 262_144
ANY_OBJECT = '{"type": "object"}'


def check_schema(text: str, field: str) -> Any:
    """The parsed schema; ServiceError if it is none, or too large to be worth a try."""
    if len(text) > MAX_SCHEMA_CHARACTERS:
        message = f"Invalid '{field}': a schema of more than {MAX_SCHEMA_CHARACTERS} characters."
        raise ServiceError("json_schema_too_complex", message, field)
    try:
        schema = json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        message = f"Invalid '{field}': the schema is nested too deeply."
        raise ServiceError("json_schema_too_complex", message, field) from error
    except ValueError as error:
        message = f"Invalid '{field}': the schema is not JSON."
        raise ServiceError("invalid_json_schema", message, field) from error
    if not isinstance(schema, dict | bool):
        message = f"Invalid '{field}': a schema is an object."
        raise ServiceError("invalid_json_schema", message, field)
    return schema


def one_line(text: str) -> str:
    """The same JSON without line breaks, which can only be white space."""
    return text.replace("\n", " ").replace("\r", " ").strip()


def object_schema(text: str | None) -> str:
    """A function's parameters as a schema that says it is about an object."""
    if text is None:
        return ANY_OBJECT
    if "type" in json.loads(text):
        return text
    rest = text.strip().removeprefix("{")
    return '{"type": "object"' + (rest if rest.strip() == "}" else "," + rest)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
