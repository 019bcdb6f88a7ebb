"""JSON Schemas as text: whether they are JSON at all, and how they stand inside of a grammar.

Whether a schema can be compiled is the generator's to say.
"""

import json
from typing import Any

from tokenizer_svc.ranges import is_deeper
from trivium.wire.errors import ServiceError

# Keywords that judge an object beside `properties`, in the same schema and in another.
_JOINING = frozenset(("anyOf", "oneOf", "$ref"))
_MEDDLING = frozenset(
    ("allOf", "not", "if", "dependentSchemas", "minProperties", "unevaluatedProperties")
) | {"$dynamicRef", "propertyNames"}
# Keywords with data in them, and with schemas by name.
_DATA = frozenset(("const", "enum", "default", "examples"))
_NAMING = frozenset(("properties", "patternProperties", "$defs", "definitions"))

MAX_SCHEMA_CHARACTERS = 262_144
MAX_DEPTH = 128
ANY_OBJECT = '{"type": "object"}'


def check_schema(text: str, field: str) -> Any:
    """The parsed schema; ServiceError if it is none, or too large to be worth a try."""
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
    return schema


def one_line(text: str) -> str:
    """The same JSON without line breaks, which can only be white space."""
    return text.replace("\n", " ").replace("\r", " ").strip()


def arguments_schema(text: str | None) -> str:
    """A function's parameters as a schema of what a model may write.

    That is an object; and where the schema names fields and does not say whether there may be
    others, there are none, or else small models invent some.
    """
    if text is None:
        return ANY_OBJECT
    schema = {"type": "object"} | json.loads(text)
    return json.dumps(_closed(schema) if _can_be_closed(schema) else schema)


def _can_be_closed(schema: Any) -> bool:
    """Whether no part of the schema is put together with another that names further fields."""
    if isinstance(schema, list):
        return all(map(_can_be_closed, schema))
    if not isinstance(schema, dict):
        return True
    joined = "properties" in schema and not _JOINING.isdisjoint(schema)
    return not joined and _MEDDLING.isdisjoint(schema) and all(map(_can_be_closed, schema.values()))


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed_keyword(key, value) for key, value in schema.items()}
    if "properties" in schema and "patternProperties" not in schema:
        closed.setdefault("additionalProperties", False)
    return closed


def _closed_keyword(key: str, value: Any) -> Any:
    if key in _DATA:
        return value
    if key in _NAMING and isinstance(value, dict):
        return {name: _closed(schema) for name, schema in value.items()}
    return _closed(value)


def _too_deep(field: str) -> ServiceError:
    message = f"Invalid '{field}': the schema is nested too deeply."
    return ServiceError("json_schema_too_complex", message, field)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
