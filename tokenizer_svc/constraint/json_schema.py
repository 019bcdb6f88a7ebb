"""JSON Schemas as they stand in a grammar: of an answer's text or of a function's arguments."""

import json
from collections.abc import Iterator
from typing import Any

# Keywords with data in them, and with schemas by name.
_DATA = frozenset(("const", "enum", "default", "examples"))
_NAMING = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"}
)
_DEFINITIONS = ("$defs", "definitions")
# Keywords whose schemas are about the same object, and those that may ask what is not so.
_IN_PLACE = frozenset(("allOf", "anyOf", "oneOf"))
_CONDITIONS = frozenset(("not", "if", "then", "else", "dependentSchemas", "dependencies"))
# Keywords that say, themselves or elsewhere, which fields there are besides `properties`.
_FIELDS = _IN_PLACE | frozenset(
    {
        "$ref",
        "$dynamicRef",
        "if",
        "dependentSchemas",
        "dependentRequired",
        "dependencies",
        "patternProperties",
        "additionalProperties",
        "unevaluatedProperties",
        "minProperties",
    }
)

ANY_OBJECT = '{"type": "object"}'


def one_line(text: str) -> str:
    """The same JSON without line breaks, which can only be white space."""
    return text.replace("\n", " ").replace("\r", " ").strip()


def lenient(text: str) -> str:
    """The schema with the word to the generator to drop from it what cannot be kept."""
    schema = json.loads(text)
    return json.dumps(schema | {"x-guidance": {"lenient": True}} if schema is not True else schema)


def arguments_schema(text: str | None) -> str:
    """A function's parameters as a schema of what a model may write.

    That is an object; and where the schema names fields and does not say whether there may be
    others, there are none, or else small models invent some. A function whose parameters say
    nothing of fields has none.
    """
    schema = {"type": "object"} | json.loads(text or "{}")
    schema.pop("x-guidance", None)
    others = {"required", "propertyNames", "maxProperties", "const", "enum"}
    if (_FIELDS | others).isdisjoint(schema):
        schema.setdefault("properties", {})
    _close(schema)
    return json.dumps(schema)


def _close(root: dict[str, Any]) -> None:
    """Rules out fields that no schema of an object names, where all that name them are known."""
    nodes = list(_subschemas(root))
    # What is used beside other schemas must leave room for the fields that they name.
    merged = [
        str(node["$ref"])
        for node, shared, _ in nodes
        if "$ref" in node and (shared or _judges(node, "$ref"))
    ]
    if not all(target.startswith(("#/$defs/", "#/definitions/")) for target in merged):
        return
    for node, shared, is_definition in nodes:
        closes = not shared and not (is_definition and merged) and _FIELDS.isdisjoint(node)
        if closes and isinstance(node.get("properties"), dict):
            node["additionalProperties"] = False
            named = node["properties"]
            node["properties"] = named | {
                name: True for name in node.get("required", ()) if name not in named
            }


def _subschemas(
    node: Any, shared: bool = False, is_definition: bool = False
) -> Iterator[tuple[dict[str, Any], bool, bool]]:
    """All schemas within one, whether others judge the same object, and whether by reference."""
    if not isinstance(node, dict):
        return
    yield node, shared, is_definition
    for key, value in node.items():
        if key in _DATA:
            continue
        if key in _NAMING and isinstance(value, dict):
            value = list(value.values())
        inner = value if isinstance(value, list) else [value]
        beside = key in _CONDITIONS
        if key in _IN_PLACE:
            beside = shared or _judges(node, key) or (key == "allOf" and len(inner) > 1)
        for schema in inner:
            yield from _subschemas(schema, beside, is_definition or key in _DEFINITIONS)


def _judges(node: dict[str, Any], key: str) -> bool:
    """Whether a schema says anything about an object's fields besides with this keyword."""
    return bool(((_FIELDS | {"properties", "required"}) - {key}) & node.keys())
