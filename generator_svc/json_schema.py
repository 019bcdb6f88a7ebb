"""JSON schemas as llguidance has to be told them, so that what it lets through fits them.

Knows nothing about tokens.
"""

import json
import math
import re
from typing import Any

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
_DATA = ("const", "enum", "default", "examples")  # values in a schema that are no schemas
_BOUNDS = (
    ("exclusiveMinimum", "minimum", ("maximum", "exclusiveMaximum"), 1),
    ("exclusiveMaximum", "maximum", ("minimum", "exclusiveMinimum"), -1),
)
_HAIR = 1e-6


def repaired(text: str) -> str:
    """The same schema, or one a hair narrower.

    llguidance 1.9 lets 3 through as "above 3 and at most 3.5": an exclusive whole bound whose
    other bound is less than 1 away.
    """
    if "exclusiveM" not in text:
        return text
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):  # llguidance will say what is wrong
        return text
    is_changed = False
    rest = [schema]
    while rest:
        node = rest.pop()
        if isinstance(node, dict):
            # Schemas that are merged may bring the other bound from elsewhere.
            is_changed |= _narrow(node, "allOf" in text or "$ref" in text)
            rest += [value for key, value in node.items() if key not in _DATA]
        elif isinstance(node, list):
            rest += node
    return json.dumps(schema) if is_changed else text


def repaired_lark(lark: str) -> str:
    """The same grammar, with every %json repaired and held to OPTIONS."""
    option = f'"x-guidance": {json.dumps(OPTIONS)}}}'
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
            text = repaired(lark[start:end])
            parts += [lark[done:start], text[:-1], ", " if schema else "", option]
            done = end
    return "".join(parts) + lark[done:]


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
