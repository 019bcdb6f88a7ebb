"""Rewrites JSON Schemas for a grammar: of an answer's text, or of a function's arguments."""

import json
from collections.abc import Iterator
from typing import Any

from trivium.discriminated_unions import are_apart

# Keywords whose values are data, not schemas; and those whose values are schemas by name.
_DATA_KEYWORDS = frozenset(("const", "enum", "default", "examples"))
_NAMED_SCHEMAS_KEYWORDS = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"}
)
_DEFINITIONS = ("$defs", "definitions")
# Keywords that combine schemas of the same instance, and those that apply them as conditions: what
# a condition says of an instance need not hold.
_COMPOSITION_KEYWORDS = frozenset(("allOf", "anyOf", "oneOf"))
_CONDITIONAL_KEYWORDS = frozenset(("not", "if", "then", "else", "dependentSchemas", "dependencies"))
# Keywords by which another schema may speak of the same properties as `properties`.
_OVERLAPPING_KEYWORDS = _COMPOSITION_KEYWORDS | frozenset(
    ("$ref", "$dynamicRef", "if", "dependentSchemas", "dependencies", "patternProperties")
)
# Keywords by which a schema allows, asks for, or refers to properties not in its `properties`.
_OBJECT_KEYWORDS = _OVERLAPPING_KEYWORDS | frozenset(
    ("dependentRequired", "additionalProperties", "unevaluatedProperties", "minProperties")
)

ANY_OBJECT = '{"type": "object"}'


def one_line(text: str) -> str:
    """The same JSON without line breaks, which can only be white space."""
    return text.replace("\n", " ").replace("\r", " ").strip()


def lenient(text: str) -> str:
    """The schema, marked so that llguidance ignores the keywords that it does not support."""
    schema = json.loads(text)
    if isinstance(schema, dict):
        schema |= {"x-guidance": {"lenient": True}}
    return json.dumps(schema)


def answer_schema(text: str, exact: bool) -> str:
    """A response format's schema as one of the JSON that a model may write.

    Where it lists an object's properties and does not say whether there may be others, there are
    none: small models would go on with properties of their own, and never end. An `exact` one is
    left as it is where that could let through what it forbids.
    """
    schema = json.loads(text)
    if isinstance(schema, dict):
        _close(schema, exact)
    return json.dumps(schema)


def arguments_schema(text: str | None, exact: bool) -> str:
    """A function's parameters as a schema of the arguments that a model may write.

    Arguments are an object, of no other properties than an answer has. A function whose schema says
    nothing about properties takes no arguments.
    """
    schema = {"type": "object"} | json.loads(text or "{}")
    schema.pop("x-guidance", None)
    others = {"required", "propertyNames", "maxProperties", "const", "enum"}
    if (_OBJECT_KEYWORDS | others).isdisjoint(schema):
        schema.setdefault("properties", {})
    _close(schema, exact)
    return json.dumps(schema)


def _close(root: dict[str, Any], exact: bool) -> None:
    """Forbids additional properties wherever all schemas that could name one are known."""
    nodes = list(_subschemas(root))
    # Closed, the members of a oneOf could be apart that are not: what fits one would fit two.
    if exact and not all(are_apart(node["oneOf"], root) for node, *_ in nodes if "oneOf" in node):
        return
    # A definition that is combined with other schemas has to allow the properties that they name.
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
            if isinstance(required, list):  # below a keyword that we do not know it may be anything
                names = [name for name in required if isinstance(name, str) and name not in named]
                node["properties"] = named | dict.fromkeys(names, True)


def _subschemas(
    node: Any, shared: bool = False, is_definition: bool = False
) -> Iterator[tuple[dict[str, Any], bool, bool]]:
    """Every schema in `node`: itself, whether others apply to the same object, whether it is a
    definition."""
    if not isinstance(node, dict):
        return
    yield node, shared, is_definition
    # What one schema says of a property, or of an array's items, another may add to.
    overlaps = shared or not _OVERLAPPING_KEYWORDS.isdisjoint(node)
    for key, value in node.items():
        if key in _DATA_KEYWORDS:
            continue
        if key in _NAMED_SCHEMAS_KEYWORDS and isinstance(value, dict):
            value = list(value.values())
        inner = value if isinstance(value, list) else [value]
        beside = key in _CONDITIONAL_KEYWORDS or (overlaps and key not in _DEFINITIONS)
        if key in _COMPOSITION_KEYWORDS:
            beside = shared or _has_other_keywords(node, key) or (key == "allOf" and len(inner) > 1)
        for schema in inner:
            yield from _subschemas(schema, beside, is_definition or key in _DEFINITIONS)


def _has_other_keywords(node: dict[str, Any], key: str) -> bool:
    """Whether a schema constrains an object's properties by a keyword other than this one."""
    return bool(((_OBJECT_KEYWORDS | {"properties", "required"}) - {key}) & node.keys())
