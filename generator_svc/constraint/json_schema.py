"""Rewrites JSON schemas for llguidance, so that whatever it generates is valid.

A schema is enforced exactly or refused, unless its `x-guidance` has `lenient`: then unsupported
keywords are dropped (generator_svc.constraint.schema_relaxation).
"""

import json
import math
import re
from collections.abc import Callable
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from typing import Any
from urllib.parse import quote

from generator_svc.constraint.schema_relaxation import (
    MAX_BOUND,
    Compiles,
    children,
    coerce_one_of,
    is_read_exactly,
    is_writable,
    loosened,
    relaxed,
)
from trivium.discriminated_unions import are_disjoint
from trivium.ecma_regex import to_rust

# Whitespace between JSON tokens is a newline and indentation, so that it cannot go on forever. No
# \u escapes: a property name written with them would not be recognised.
OPTIONS: dict[str, Any] = {
    "whitespace_pattern": r"\n? {0,20}",
    "json_allowed_escapes": '"\\bfnrt',
    "coerce_one_of": False,
    "lenient": False,
}

# Lark's comments, strings and regular expressions, in which %json has no meaning, then %json.
_IN_LARK = re.compile(r'//[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|(?P<json>%json\s*)')
_BOUNDS = (
    ("exclusiveMinimum", "minimum", ("maximum", "exclusiveMaximum"), 1),
    ("exclusiveMaximum", "maximum", ("minimum", "exclusiveMinimum"), -1),
)
_EPSILON = 1e-6
_URI = "%/:?#@!$&'()*+,;=~"  # characters of a reference besides letters, digits, and - . _
# Values with which unsupported keywords have no effect; zod and OpenAPI emit some of them.
_VACUOUS: dict[str, list[Any]] = {
    "propertyNames": [True, {}, {"type": "string"}],
    "uniqueItems": [False],
    "not": [False],
    "unevaluatedProperties": [True, {}],
    "unevaluatedItems": [True, {}],
    "dependentRequired": [{}],
    "dependentSchemas": [{}],
    "dependencies": [{}],
}
_EXACT = 2**53  # every smaller integer is exactly a double
_DIGITS = 15  # llguidance reads numbers of up to this many digits exactly

# What formats have to match in addition to llguidance's own check: only days that exist, in the
# years 1 to 9999; no leap seconds, since no regular expression can tell where they are valid; no
# punycode; host names and mail accounts of bounded length.
_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = f"(?:{_YEAR}-(?:0[13-9]|1[0-2]|02-(?:[01]|2[0-8]))|{_LEAP_YEAR}-02-29)"
_ALNUM = "[A-Za-z0-9]"
_HOST_LABEL = (
    f"{_ALNUM}(?:[A-Za-z0-9-]?{_ALNUM}|[A-Za-z0-9-]{{2}}{_ALNUM}|"
    f"[A-Za-z0-9-](?:{_ALNUM}[A-Za-z0-9-]|-{_ALNUM})[A-Za-z0-9-]{{0,58}}{_ALNUM})?"
)
_FORMATS = {
    "date": f"^{_DATE}",
    "date-time": f"^{_DATE}-?[0-9]*[Tt][0-9]{{2}}:[0-9]{{2}}:[0-5]",
    "time": "^[0-9]{2}:[0-9]{2}:[0-5]",
    "hostname": f"^{_HOST_LABEL}(?:[.]{_HOST_LABEL})*$",
    "email": "^[^@]{1,64}@(?:[^@.]{1,63}[.])*[^@.]{1,63}$",
}
_MAX_LENGTHS = {"hostname": 253, "email": 254}


def prepared(text: str) -> str:
    """An equivalent or very slightly narrower schema for llguidance; a wider one if lenient.

    Patterns are rewritten in Rust's syntax. Exclusive integer bounds become inclusive ones if the
    opposite bound is at most 1 away: llguidance 1.9 accepts 3 as "above 3 and at most 3.5". Raises
    ValueError for what llguidance would accept without enforcing it.
    """
    try:
        schema = json.loads(text)
        before = json.dumps(schema)
    except (ValueError, RecursionError):  # llguidance reports what is wrong
        return text
    lenient = is_lenient(schema)
    if lenient:
        schema = relaxed(schema)
    is_one_resource = text.count('"$id"') <= (isinstance(schema, dict) and "$id" in schema)
    rest = [schema]
    while rest:
        node = rest.pop()
        if isinstance(node, dict):
            if not lenient:
                _check_exact(node)
            if is_one_resource and are_disjoint(node.get("oneOf"), schema):
                coerce_one_of(node)
            for key, values in _VACUOUS.items():
                if key in node and node[key] in values:
                    del node[key]
            reference = node.get("$ref")
            if isinstance(reference, str):
                node["$ref"] = quote(reference, safe=_URI)
            _round_bounds(node)
            # After merging, the opposite bound may come from another schema.
            _narrow(node, "allOf" in text or "$ref" in text)
            _translate(node)
            _complete_format(node)
            rest += [child for _, child in children(node)]
    after = json.dumps(schema)
    return text if after == before else after


def prepared_lark(lark: str) -> str:
    """The same grammar with every %json schema prepared and given OPTIONS."""
    option = f'"x-guidance": {json.dumps(OPTIONS)}}}'

    def rewritten(text: str) -> str:
        text = prepared(text)
        return f"{text[:-1]}, {option}" if text[1:-1].strip() else f"{{{option}"

    return _each_json(lark, rewritten)


def is_lenient(schema: Any) -> bool:
    """Whether unsupported keywords of a schema may be dropped."""
    options = schema.get("x-guidance") if isinstance(schema, dict) else None
    return isinstance(options, dict) and options.get("lenient") is True


def loosened_text(kind: str, text: str, compiles: Compiles) -> str:
    """The same `json_schema` or `lark` with each lenient schema loosened until it compiles.

    `compiles` tells whether a lenient schema compiles.
    """

    def rewritten(text: str) -> str:
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
        return _each_json(text, rewritten)
    return rewritten(text) if kind == "json_schema" else text


def _each_json(lark: str, rewrite: Callable[[str], str]) -> str:
    """The grammar with the schema of every %json rewritten.

    Adds line and column to a ValueError that `rewrite` raises.
    """
    parts, done = [], 0
    for match in _IN_LARK.finditer(lark):
        start = match.end()
        if match["json"] is None or start < done:
            continue
        try:
            schema, end = json.JSONDecoder().raw_decode(lark, start)
        except (ValueError, RecursionError):  # llguidance reports what is wrong
            continue
        if isinstance(schema, dict):
            try:
                rewritten = rewrite(lark[start:end])
            except ValueError as error:
                line = lark.count("\n", 0, start) + 1
                column = start - lark.rfind("\n", 0, start)
                raise ValueError(f"at {line}({column}): {error}") from None
            parts += [lark[done:start], rewritten]
            done = end
    return "".join(parts) + lark[done:]


def _check_exact(node: dict[str, Any]) -> None:
    """Raises ValueError for what llguidance accepts without enforcing it."""
    for key in ("const", "enum"):
        if not is_writable(node.get(key)):
            raise ValueError(
                f"{key} has a value that cannot be generated exactly: a number of more than 15 "
                "digits, or a control character"
            )
    least = node.get("minProperties")
    if isinstance(least, int) and least > 1:
        required = node.get("required")
        names = set(map(str, required)) if isinstance(required, list) else set()
        if least > len(names) + 1:
            raise ValueError(
                f"minProperties: {least} needs at least {least - 1} names in 'required', since "
                "other properties may be repeated"
            )


def _translate(node: dict[str, Any]) -> None:
    """Rewrites patterns in Rust's syntax."""
    pattern, named = node.get("pattern"), node.get("patternProperties")
    if isinstance(pattern, str):
        node["pattern"] = to_rust(pattern)
    if isinstance(named, dict):
        node["patternProperties"] = {to_rust(name): child for name, child in named.items()}


def _complete_format(node: dict[str, Any]) -> None:
    """Adds the checks of a format that llguidance lacks."""
    name = node.get("format")
    pattern = _FORMATS.get(name) if isinstance(name, str) else None
    if pattern is None:
        return
    extra: dict[str, Any] = {"pattern": pattern}
    if name in _MAX_LENGTHS:
        extra["maxLength"] = _MAX_LENGTHS[name]
    if extra.keys().isdisjoint(node):
        node |= extra
    elif isinstance(node.setdefault("allOf", []), list):
        node["allOf"] = [*node["allOf"], extra]


def _round_bounds(node: dict[str, Any]) -> None:
    """Rounds inwards the bounds that llguidance would round, possibly outwards, or refuse."""
    for exclusive, inclusive, _, sign in _BOUNDS:
        for key in (exclusive, inclusive):
            bound = node.get(key)
            if not isinstance(bound, int | float):
                continue
            if abs(bound) >= _EXACT:
                _round_far(node, key, inclusive, sign)
            elif isinstance(bound, float) and not is_read_exactly(bound):
                context = Context(prec=_DIGITS, rounding=ROUND_CEILING if sign > 0 else ROUND_FLOOR)
                node[key] = float(context.create_decimal(repr(bound)))


def _round_far(node: dict[str, Any], key: str, inclusive: str, sign: int) -> None:
    """Replaces a bound of large magnitude by an inclusive one that is a double within 64 bits."""
    least = sign * node[key]  # of the number, or of its negative
    if least > MAX_BOUND:
        return  # no value satisfies it, and llguidance reports that
    within = float(max(least, -MAX_BOUND))
    while within < least or (within == least and key != inclusive):
        within = math.nextafter(within, math.inf)
    del node[key]
    known: Any = node.get(inclusive)
    limits = [int(within), *([sign * known] if _is_number(known) else [])]
    node[inclusive] = sign * max(limits)


def _narrow(node: dict[str, Any], is_merged: bool) -> None:
    """Turns exclusive integer bounds into inclusive ones where needed, see `prepared`."""
    for exclusive, inclusive, opposite, sign in _BOUNDS:
        bound: Any = node.get(exclusive)
        if not _is_number(bound) or bound % 1 or node.get("type") == "integer":
            continue
        widths = [abs(node[key] - bound) for key in opposite if _is_number(node.get(key))]
        width = min(widths, default=1.0 if is_merged else math.inf)
        if width <= 1:
            del node[exclusive]
            narrow = bound + sign * (min(_EPSILON, width / 1000) or _EPSILON)
            known = node.get(inclusive)
            if _is_number(known):
                narrow = max(narrow, known) if sign > 0 else min(narrow, known)
            node[inclusive] = narrow


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_BOUND
    )
