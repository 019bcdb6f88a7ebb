"""Validates a JSON Schema given as text.

The generator compiles it and may still refuse it.
"""

import json
from typing import Any

from tokenizer_svc.request.field_checks import is_deeper
from tokenizer_svc.request.metaschema import schema_error
from trivium.limits import MAX_SCHEMA_CHARACTERS
from trivium.wire.errors import ServiceError

MAX_DEPTH = 128


def check_schema(text: str, field: str) -> Any:
    """The parsed schema; raises ServiceError if it is not a schema, or too large to try."""
    if len(text) > MAX_SCHEMA_CHARACTERS:
        message = f"Invalid '{field}': a schema of more than {MAX_SCHEMA_CHARACTERS} characters."
        raise ServiceError("json_schema_too_complex", message, field)
    try:
        schema = json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise _too_deep(field) from error
    except ValueError as error:
        message = f"Invalid '{field}': the schema is not JSON."
        raise ServiceError("invalid_json_schema", message, field) from error
    if is_deeper(schema, MAX_DEPTH):
        raise _too_deep(field)
    if not isinstance(schema, dict | bool):
        message = f"Invalid '{field}': a schema is an object."
        raise ServiceError("invalid_json_schema", message, field)
    wrong = schema_error(schema)
    if wrong is not None:
        message = f"Invalid schema for '{field}': {wrong}."
        raise ServiceError("invalid_json_schema", message, field)
    return schema


def _too_deep(field: str) -> ServiceError:
    message = f"Invalid '{field}': the schema is nested too deeply."
    return ServiceError("json_schema_too_complex", message, field)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
