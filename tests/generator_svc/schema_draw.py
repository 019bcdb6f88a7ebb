"""Random JSON Schemas of everything that the generator's constraints support."""

import random
from typing import Any

FORMATS = ["date-time", "date", "time", "email", "uuid", "ipv4", "hostname", "duration", "uri"]
PATTERNS = ["^[a-c]{2,5}$", "^(yes|no)$", "[0-9]+-[0-9]+", "^\\d{3}$", "^x.*y$"]


def draw_schema(draw: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema about `depth` levels deep. Some cannot be compiled or satisfied."""
    tree = {
        "type": "object",
        "properties": {
            "value": _draw(draw, 0),
            "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
        },
        "required": ["value"],
        "additionalProperties": False,
    }
    return {"$defs": {"tree": tree}} | _draw(draw, depth)


def _draw(draw: random.Random, depth: int) -> dict[str, Any]:
    leaves = [_string, _number, _integer, _literal, _anything]
    nodes = [_object, _object, _array, _tuple, _union, _type_list, _reference, _intersection]
    return draw.choice(leaves if depth == 0 else leaves + 2 * nodes)(draw, depth)


def _string(draw: random.Random, depth: int) -> dict[str, Any]:
    kind = draw.randrange(4)
    if kind == 0:
        return {"type": "string", "format": draw.choice(FORMATS)}
    if kind == 1:
        return {"type": "string", "pattern": draw.choice(PATTERNS)}
    least = draw.randrange(4)
    schema = {"type": "string", "minLength": least, "maxLength": least + draw.randrange(9)}
    if draw.random() < 0.2:
        schema["pattern"] = draw.choice(PATTERNS)
    return schema


def _number(draw: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "number"}
    if draw.random() < 0.6:
        schema[draw.choice(["minimum", "exclusiveMinimum"])] = draw.choice([-7.25, 0, 0.5, 3])
    if draw.random() < 0.6:
        schema[draw.choice(["maximum", "exclusiveMaximum"])] = draw.choice([3.5, 10, 1e6])
    if draw.random() < 0.1:
        schema["multipleOf"] = draw.choice([0.5, 0.01])
    return schema


def _integer(draw: random.Random, depth: int) -> dict[str, Any]:
    least = draw.randrange(-200, 200)
    schema: dict[str, Any] = {"type": "integer", "minimum": least}
    if draw.random() < 0.7:
        schema["maximum"] = least + draw.randrange(500)
    if draw.random() < 0.2:
        schema["multipleOf"] = draw.choice([2, 3, 10])
    return schema


def _literal(draw: random.Random, depth: int) -> dict[str, Any]:
    texts = ["a", "two words", "é🫠", 'quote " and \\']
    values = [*texts, 0, -3, 2.5, True, False, None, [], {"k": [1]}]
    chosen = draw.sample(values, draw.randrange(1, 5))
    return {"enum": chosen} if draw.random() < 0.7 else {"const": chosen[0]}


def _anything(draw: random.Random, depth: int) -> dict[str, Any]:
    return draw.choice([{}, {"type": "boolean"}, {"type": "null"}, {"type": "object"}])


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(["a", "b", "name", "long key", "ü"], draw.randrange(5))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _draw(draw, depth - 1) for name in names},
        "required": draw.sample(names, draw.randrange(len(names) + 1)),
    }
    if draw.random() < 0.2:
        schema["minProperties"] = draw.randrange(3)
    if draw.random() < 0.3:
        schema["patternProperties"] = {"^x-": _draw(draw, 0)}
    extra = draw.randrange(3)
    if extra < 2:
        schema["additionalProperties"] = False if extra else _draw(draw, 0)
    return schema


def _array(draw: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array", "items": _draw(draw, depth - 1)}
    if draw.random() < 0.5:
        schema["minItems"] = draw.randrange(4)
    if draw.random() < 0.5:
        schema["maxItems"] = schema.get("minItems", 0) + draw.randrange(3)
    return schema


def _tuple(draw: random.Random, depth: int) -> dict[str, Any]:
    first = [_draw(draw, depth - 1) for _ in range(draw.randrange(1, 4))]
    return {"type": "array", "prefixItems": first, "items": draw.choice([False, {"type": "null"}])}


def _union(draw: random.Random, depth: int) -> dict[str, Any]:
    kind = draw.choice(["anyOf", "anyOf", "oneOf"])
    return {kind: [_draw(draw, depth - 1) for _ in range(draw.randrange(1, 4))]}


def _type_list(draw: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "null", "array", "object"]
    return {"type": draw.sample(kinds, draw.randrange(1, 4))}


def _intersection(draw: random.Random, depth: int) -> dict[str, Any]:
    other = {"type": "object", "required": ["c"], "properties": {"c": _draw(draw, 0)}}
    return {"allOf": [_object(draw, depth), other]}


def _reference(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"$ref": "#/$defs/tree"}
