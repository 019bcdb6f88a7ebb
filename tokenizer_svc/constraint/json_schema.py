"""Rewrites the JSON Schemas of answers and of function arguments for use in a grammar."""

import json
from collections.abc import Iterator
from typing import Any

from trivium.discriminated_unions import are_disjoint

# Keywords whose values are data, not schemas; and keywords whose values are schemas by name.
_DATA_KEYWORDS = frozenset(("const", "enum", "default", "examples"))
_NAMED_SCHEMAS_KEYWORDS = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"}
)
_DEFINITIONS = ("$defs", "definitions")
# Keywords that combine schemas for the same instance, and keywords that apply schemas
# conditionally, which the instance need not match.
_COMPOSITION_KEYWORDS = frozenset(("allOf", "anyOf", "oneOf"))
_CONDITIONAL_KEYWORDS = frozenset(("not", "if", "then", "else", "dependentSchemas", "dependencies"))
# Keywords through which another schema may apply to the properties in `properties`.
_OVERLAPPING_KEYWORDS = _COMPOSITION_KEYWORDS | frozenset(
    ("$ref", "$dynamicRef", "if", "dependentSchemas", "dependencies", "patternProperties")
)
# Keywords with which a schema allows, requires or refers to properties not in `properties`.
_OBJECT_KEYWORDS = _OVERLAPPING_KEYWORDS | frozenset(
    ("dependentRequired", "additionalProperties", "unevaluatedProperties", "minProperties")
)

ANY_OBJECT = '{"type": "object"}'


def one_line(text: str) -> str:
    """The same JSON without line breaks, which can only be insignificant white space."""
    return text.replace("\n", " ").replace("\r", " ").strip()


def lenient(text: str) -> str:
    """The schema, marked so that llguidance ignores keywords that it does not support."""
    schema = json.loads(text)
    if isinstance(schema, dict):
        schema |= {"x-guidance": {"lenient": True}}
    return json.dumps(schema)


def answer_schema(text: str, exact: bool) -> str:
    """The schema with which a response format is enforced.

    An object whose schema lists properties without saying whether others are allowed may have no
    others: small models would keep inventing properties and never end. An `exact` schema is left
    unchanged if that could let through what it forbids.
    """
    schema = json.loads(text)
    if isinstance(schema, dict):
        _forbid_additional_properties(schema, exact)
    return json.dumps(schema)


def arguments_schema(text: str | None, exact: bool) -> str:
    """The schema with which a function's arguments are enforced.

    Arguments are an object, whose properties are restricted as in `answer_schema`. A function whose
    schema says nothing about properties takes no arguments.
    """
    schema = {"type": "object"} | json.loads(text or "{}")
    schema.pop("x-guidance", None)
    others = {"required", "propertyNames", "maxProperties", "const", "enum"}
    if (_OBJECT_KEYWORDS | others).isdisjoint(schema):
        schema.setdefault("properties", {})
    _forbid_additional_properties(schema, exact)
    return json.dumps(schema)


def _forbid_additional_properties(root: dict[str, Any], exact: bool) -> None:
    """Forbids additional properties wherever all schemas that could name a property are known."""
    nodes = list(_subschemas(root))
    # Closing could make overlapping members of a oneOf disjoint, and so allow what matches two.
    if exact and not all(
        are_disjoint(node["oneOf"], root) for node, *_ in nodes if "oneOf" in node
    ):
        return
    # A definition combined with other schemas has to allow the properties that they name.
    merged = [
        str(node["$ref"])
        for node, shared, _ in nodes
        if "$ref" in node and (shared or _has_other_keywords(node, "$ref"))
    ]
    if not all(target.startswith(("#/$defs/", "#/definitions/")) for target in merged):
        return
    for node, shared, is_definition in nodes:
        closes = not shared and not (is_definition and merged) and _OBJECT_KEYWORDS.isdisjoint(node)
        if closes and isinstance(node.get("properties"), dict):
            node["additionalProperties"] = False
            named, required = node["properties"], node.get("required")
            if isinstance(required, list):  # under an unknown keyword it may be anything
                names = [name for name in required if isinstance(name, str) and name not in named]
                node["properties"] = named | dict.fromkeys(names, True)


def _subschemas(
    node: Any, shared: bool = False, is_definition: bool = False
) -> Iterator[tuple[dict[str, Any], bool, bool]]:
    """Yields each schema in `node`, whether other schemas apply to the same object, and whether it
    is part of a definition."""
    if not isinstance(node, dict):
        return
    yield node, shared, is_definition
    # Another schema may constrain the same property, or the same array's items.
    overlaps = shared or not _OVERLAPPING_KEYWORDS.isdisjoint(node)
    for key, value in node.items():
        if key in _DATA_KEYWORDS:
            continue
        if key in _NAMED_SCHEMAS_KEYWORDS and isinstance(value, dict):
            value = list(value.values())
        inner = value if isinstance(value, list) else [value]
        inner_shared = key in _CONDITIONAL_KEYWORDS or (overlaps and key not in _DEFINITIONS)
        if key in _COMPOSITION_KEYWORDS:
            inner_shared = (
                shared or _has_other_keywords(node, key) or (key == "allOf" and len(inner) > 1)
            )
        for schema in inner:
            yield from _subschemas(schema, inner_shared, is_definition or key in _DEFINITIONS)


def _has_other_keywords(node: dict[str, Any], key: str) -> bool:
    """Whether a schema constrains an object's properties with a keyword other than `key`."""
    return bool(((_OBJECT_KEYWORDS | {"properties", "required"}) - {key}) & node.keys())
