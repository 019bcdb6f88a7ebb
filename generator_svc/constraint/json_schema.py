"""JSON schemas as llguidance has to be told them, so that what it lets through fits them.

A schema is kept exactly or refused, unless its `x-guidance` says `lenient`: then what cannot be
kept is dropped (generator_svc.constraint.schema_relaxation). Knows nothing about tokens.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any

from generator_svc.constraint.schema_relaxation import Compiles, children, loosened, relaxed
from trivium.ecma_regex import to_rust

# Between JSON's tokens: a line's end and its indentation, and no endless blanks. No \u escapes:
# they would let a property's name be written in a way that is not taken for it.
OPTIONS: dict[str, Any] = {
    "whitespace_pattern": r"\n? {0,20}",
    "json_allowed_escapes": '"\\bfnrt',
    "coerce_one_of": False,
    "lenient": False,
}

# What may hold %json in Lark without being one, then one.
_IN_LARK = re.compile(r'//[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|(?P<json>%json\s*)')
# Schemas without these words are told as they are.
_CHANGED = re.compile(r'exclusiveM|"pattern|"x-guidance')
_BOUNDS = (
    ("exclusiveMinimum", "minimum", ("maximum", "exclusiveMaximum"), 1),
    ("exclusiveMaximum", "maximum", ("minimum", "exclusiveMinimum"), -1),
)
_HAIR = 1e-6


def prepared(text: str) -> str:
    """The same schema in llguidance's terms, or a hair narrower; a wider one if it is lenient.

    Its patterns are Rust's. And llguidance 1.9 lets 3 through as "above 3 and at most 3.5": an
    exclusive whole bound whose other bound is less than 1 away.
    """
    if not _CHANGED.search(text):
        return text
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):  # llguidance will say what is wrong
        return text
    before = text
    if is_lenient(schema):
        schema = relaxed(schema)
        before = ""
    is_changed = False
    rest = [schema]
    while rest:
        node = rest.pop()
        if isinstance(node, dict):
            # Schemas that are merged may bring the other bound from elsewhere.
            is_changed |= _narrow(node, "allOf" in text or "$ref" in text)
            is_changed |= _translate(node)
            rest += [child for _, child in children(node)]
    return json.dumps(schema) if is_changed or not before else text


def prepared_lark(lark: str) -> str:
    """The same grammar, with every %json prepared and held to OPTIONS."""
    option = f'"x-guidance": {json.dumps(OPTIONS)}}}'

    def told(text: str) -> str:
        text = prepared(text)
        return f"{text[:-1]}, {option}" if text[1:-1].strip() else f"{{{option}"

    return _each_json(lark, told)


def is_lenient(schema: Any) -> bool:
    """Whether what cannot be kept of a schema may be dropped."""
    options = schema.get("x-guidance") if isinstance(schema, dict) else None
    return isinstance(options, dict) and options.get("lenient") is True


def loosened_text(kind: str, text: str, compiles: Compiles) -> str:
    """The same `json_schema` or `lark`, with less in its lenient schemas, so that each compiles.

    `compiles` tells whether a schema, which is lenient, can be used.
    """

    def told(text: str) -> str:
        try:
            schema = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if not is_lenient(schema) or compiles(schema):
            return text
        options = {"x-guidance": schema["x-guidance"]}
        return json.dumps(
            loosened(relaxed(schema), lambda tried: compiles(tried | options)) | options
        )

    if kind == "lark":
        return _each_json(text, told)
    return told(text) if kind == "json_schema" else text


def _each_json(lark: str, told: Callable[[str], str]) -> str:
    """The grammar with another text for the object of every %json."""
    parts, done = [], 0
    for match in _IN_LARK.finditer(lark):
        start = match.end()
        if match["json"] is None or start < done:
            continue
        try:
            schema, end = json.JSONDecoder().raw_decode(lark, start)
        except (ValueError, RecursionError):  # llguidance will say what is wrong
            continue
        if isinstance(schema, dict):
            parts += [lark[done:start], told(lark[start:end])]
            done = end
    return "".join(parts) + lark[done:]


def _translate(node: dict[str, Any]) -> bool:
    """Writes patterns in Rust's syntax; tells whether that changed them."""
    before = node.get("pattern"), node.get("patternProperties")
    pattern, named = before
    if isinstance(pattern, str):
        node["pattern"] = to_rust(pattern)
    if isinstance(named, dict):
        node["patternProperties"] = {to_rust(name): child for name, child in named.items()}
    return (node.get("pattern"), node.get("patternProperties")) != before


def _narrow(node: dict[str, Any], is_merged: bool) -> bool:
    """Makes inclusive bounds of exclusive ones where needed; tells whether there were any."""
    is_changed = False
    for exclusive, inclusive, opposite, sign in _BOUNDS:
        bound: Any = node.get(exclusive)
        if not _is_number(bound) or bound % 1 or node.get("type") == "integer":
            continue
        widths = [abs(node[key] - bound) for key in opposite if _is_number(node.get(key))]
        width = min(widths, default=1.0 if is_merged else math.inf)
        if width <= 1:
            del node[exclusive]
            narrow = bound + sign * (min(_HAIR, width / 1000) or _HAIR)
            known = node.get(inclusive)
            if _is_number(known):
                narrow = max(narrow, known) if sign > 0 else min(narrow, known)
            node[inclusive] = narrow
            is_changed = True
    return is_changed


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
