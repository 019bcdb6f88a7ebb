"""Whether the members of a `oneOf` are disjoint: by their types, or by a property that each object
requires, with distinct values.

llguidance compares members by merging them, which fails if they refer back to the union.
"""

from typing import Any
from urllib.parse import unquote

_MAX_REFERENCES = 16  # longest chain of references that is followed


def are_disjoint(members: Any, root: Any) -> bool:
    """Whether types, or a required string property, show that no value matches two of the
    schemas."""
    if not isinstance(members, list) or not members:
        return False
    schemas = [_resolved(member, root) for member in members]
    types = [schema.get("type") if isinstance(schema, dict) else None for schema in schemas]
    others = [kind for kind in types if kind != "object"]
    if not all(isinstance(kind, str) for kind in others) or len(set(others)) < len(others):
        return False
    if {"integer", "number"} <= set(others):
        return False
    objects = [schema for schema, kind in zip(schemas, types, strict=True) if kind == "object"]
    return len(objects) < 2 or _are_discriminated(objects, root)


def _are_discriminated(objects: list[dict[str, Any]], root: Any) -> bool:
    lists = [schema.get("required") for schema in objects]
    required = [set(map(str, names)) for names in lists if isinstance(names, list)]
    return len(required) == len(objects) and any(
        _has_own_values([_values(schema, name, root) for schema in objects])
        for name in set.intersection(*required)
    )


def _has_own_values(members: list[list[Any]]) -> bool:
    values = [value for member in members for value in member]
    are_texts = all(members) and all(isinstance(value, str) for value in values)
    return are_texts and sum(len(set(member)) for member in members) == len(set(values))


def _values(schema: dict[str, Any], name: str, root: Any) -> list[Any]:
    """All values that a property may have; empty if unknown."""
    properties = schema.get("properties")
    node = _resolved(properties.get(name), root) if isinstance(properties, dict) else None
    if not isinstance(node, dict):
        return []
    values = node.get("enum", [node["const"]] if "const" in node else [])
    return values if isinstance(values, list) else []


def _resolved(node: Any, root: Any) -> Any:
    """The schema that `node` refers to within the root; None if it is not found."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(node, dict) or "$ref" not in node:
            return node
        reference = node["$ref"]
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return None
        node = root
        for key in unquote(reference[2:]).split("/"):
            key = key.replace("~1", "/").replace("~0", "~")
            node = node.get(key) if isinstance(node, dict) else None
    return None
