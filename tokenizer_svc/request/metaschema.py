"""Checks JSON Schemas against their metaschema: each keyword's value is of the right kind.

Covers the keywords that constraints are built from, in the union of drafts 4 to 2020-12.
"""

from collections.abc import Callable, Iterator
from typing import Any

_TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_type(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(kind, str) and kind in _TYPES for kind in value)
    return isinstance(value, str) and value in _TYPES


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict | bool)


Kind = tuple[str, Callable[[Any], bool]]
_TYPE: Kind = (f"one of {', '.join(map(repr, _TYPES))}, or a list of them", _is_type)
_SCHEMA: Kind = ("an object or a boolean", _is_schema)
_VALUES: Kind = ("an array", lambda value: isinstance(value, list))
_SCHEMAS: Kind = ("an array of schemas", lambda value: isinstance(value, list))
_OPTIONS: Kind = (
    "an array that is not empty",
    lambda value: isinstance(value, list) and value != [],
)
_ITEMS: Kind = (
    "an object, a boolean or an array",
    lambda value: isinstance(value, dict | bool | list),
)
_NAMED: Kind = ("an object", lambda value: isinstance(value, dict))
_TEXT: Kind = ("a string", lambda value: isinstance(value, str))
_NAMES: Kind = (
    "an array of strings",
    lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
)
_NUMBER: Kind = ("a number", _is_number)
_BOUND: Kind = ("a number", lambda value: _is_number(value) or isinstance(value, bool))
_STEP: Kind = ("a number above 0", lambda value: _is_number(value) and value > 0)
_COUNT: Kind = (
    "a whole number that is not negative",
    lambda value: _is_number(value) and value >= 0 and value % 1 == 0,
)

_KINDS: dict[str, Kind] = {
    "type": _TYPE,
    "enum": _VALUES,
    **dict.fromkeys(("$ref", "pattern", "format"), _TEXT),
    **dict.fromkeys(("allOf", "anyOf", "oneOf"), _OPTIONS),
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions"), _NAMED),
    **dict.fromkeys(("additionalProperties", "additionalItems", "not", "contains"), _SCHEMA),
    **dict.fromkeys(("if", "then", "else", "propertyNames"), _SCHEMA),
    "items": _ITEMS,
    "prefixItems": _SCHEMAS,
    "required": _NAMES,
    **dict.fromkeys(("minimum", "maximum"), _NUMBER),
    **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), _BOUND),
    "multipleOf": _STEP,
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _COUNT),
    **dict.fromkeys(("minProperties", "maxProperties"), _COUNT),
}


def schema_error(schema: Any, path: str = "#") -> str | None:
    """The first error in a schema, as a clause; None if there is none."""
    if isinstance(schema, bool):
        return None
    if not isinstance(schema, dict):
        return f"'{path}' must be {_SCHEMA[0]}"
    for key, kind in _KINDS.items():
        if key not in schema:
            continue
        if not kind[1](schema[key]):
            return f"'{path}/{key}' must be {kind[0]}"
        for name, inner in _schemas(key, kind, schema[key]):
            found = schema_error(inner, f"{path}/{name}")
            if found is not None:
                return found
    return None


def _schemas(key: str, kind: Kind, value: Any) -> Iterator[tuple[str, Any]]:
    """The schemas in a keyword's value, with their paths."""
    if kind is _NAMED:
        yield from ((f"{key}/{name}", inner) for name, inner in value.items())
    elif kind in (_SCHEMAS, _OPTIONS, _ITEMS) and isinstance(value, list):
        yield from ((f"{key}/{index}", inner) for index, inner in enumerate(value))
    elif kind in (_SCHEMA, _ITEMS):
        yield key, value
