"""Relaxes lenient JSON schemas: drops what llguidance cannot enforce.

Dropping a keyword only makes a schema accept more: whatever was valid stays valid. First,
unsupported keywords are dropped (`relaxed`); then, if the schema still does not compile, as few
others as possible (`loosened`).
"""

import copy
import functools
import math
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any
from urllib.parse import quote, unquote

from trivium.ecma_regex import widened

Schema = dict[str, Any]
Compiles = Callable[[Schema], bool]
Path = tuple[str | int, ...]

# Formats that are enforced; with any other one, every string is accepted.
FORMATS = frozenset(
    ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
# Keywords that are dropped wherever they occur.
DROPPED = frozenset(
    {
        "not",
        "if",
        "then",
        "else",
        "dependentSchemas",
        "dependentRequired",
        "dependencies",
        "uniqueItems",
        "contains",
        "minContains",
        "maxContains",
        "propertyNames",
        "unevaluatedItems",
        "unevaluatedProperties",
        "$dynamicRef",
        "$dynamicAnchor",
        "$recursiveRef",
    }
)
# Maximum of the significant digits of a multipleOf, read as an integer. The automaton has that many
# states: 99,991 takes a second to compile.
MAX_MULTIPLE = 10_000
# llguidance's ranges are of 64-bit integers; this is the largest of them that is a double.
MAX_BOUND = 2**63 - 1024

# Keywords whose values are data, and those whose values are schemas by name.
_DATA = frozenset(("const", "enum", "default", "examples", "example", "x-guidance"))
_NAMING = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_BOUNDS = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"))
# The order in which keywords are dropped.
_ORDER = (
    *("$schema", "$id", "pattern", "multipleOf", "maxProperties", "minProperties"),
    *("patternProperties", "maxLength", "minLength", "maxItems", "minItems", "format"),
    *("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "additionalProperties"),
    *("required", "allOf", "enum", "const", "additionalItems", "items", "prefixItems", "anyOf"),
    *("properties", "type", "$ref"),
)
# Keywords that depend on another one (the key): without it they might accept less.
_DEPENDENT = {
    "properties": ("patternProperties", "additionalProperties"),
    "prefixItems": ("items",),
    "items": ("additionalItems",),
}
# Characters that can only be written as \\u escapes, which are not allowed.
_UNWRITABLE = re.compile(r"[\x00-\x07\x0B\x0E-\x1F\x7F]")
# Where the schema is placed while parts of it are compiled.
_ROOT = "#/$defs/root"


def children(node: Schema) -> Iterator[tuple[Path, Any]]:
    """The subschemas of a schema, with their paths."""
    for key, value in node.items():
        if key in _NAMING and isinstance(value, dict):
            yield from (((key, name), child) for name, child in value.items())
        elif isinstance(value, list) and key not in _DATA:
            yield from (((key, place), child) for place, child in enumerate(value))
        elif isinstance(value, dict) and key not in _DATA:
            yield (key,), value


def relaxed(schema: Any) -> Any:
    """A copy without unsupported keywords; `oneOf` becomes `anyOf`."""
    if isinstance(schema, list):
        return [relaxed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: _relaxed_keyword(key, value) for key, value in schema.items() if _is_kept(key, value)
    }
    if isinstance(kept.get("oneOf"), list):
        coerce_one_of(kept)
    patterns = kept.get("patternProperties")
    if isinstance(patterns, dict) and any(name != widened(name) for name in patterns):
        kept = _without(kept, "patternProperties")
    return kept


def coerce_one_of(node: Schema) -> None:
    """Turns a `oneOf` into an `anyOf`."""
    options = node.pop("oneOf")
    if "anyOf" in node:
        node["allOf"] = [*node.get("allOf", ()), {"anyOf": options}]
    else:
        node["anyOf"] = options


def is_writable(value: Any) -> bool:
    """Whether llguidance writes this value of an `enum` or `const` unchanged.

    It omits characters that need an escape that is not allowed, and rounds numbers.
    """
    if isinstance(value, str):
        return not _UNWRITABLE.search(value)
    if isinstance(value, int):
        return abs(value) < 2**63 and int(float(value)) == value
    if isinstance(value, float):
        return is_read_exactly(value)
    if isinstance(value, dict):
        value = list(value.values())
    return not isinstance(value, list) or all(map(is_writable, value))


def is_read_exactly(value: float) -> bool:
    """Whether llguidance reads this double exactly: it rounds the digits, then the result, which
    makes a difference beyond 15 digits."""
    if not math.isfinite(value):
        return False
    _, digits, exponent = Decimal(repr(value)).as_tuple()
    significand = float("".join(map(str, digits)))
    power = float(f"1e{abs(int(exponent))}")
    return abs(value) == (significand * power if int(exponent) > 0 else significand / power)


def _is_kept(key: str, value: Any) -> bool:
    if key in ("const", "enum"):
        return is_writable(value)
    if key == "format":
        return not isinstance(value, str) or value in FORMATS
    if key in _BOUNDS and isinstance(value, int | float):
        return abs(value) <= MAX_BOUND
    if key == "multipleOf" and isinstance(value, int | float) and not isinstance(value, bool):
        digits = Decimal(str(value)).normalize().as_tuple().digits
        return int("".join(map(str, digits))) <= MAX_MULTIPLE
    return key not in DROPPED


def _relaxed_keyword(key: str, value: Any) -> Any:
    if key == "pattern" and isinstance(value, str):
        return widened(value)
    if key in _DATA:
        return value
    if key in _NAMING and isinstance(value, dict):
        return {name: relaxed(child) for name, child in value.items()}
    return relaxed(value)


def loosened(schema: Schema, compiles: Compiles) -> Schema:
    """A schema that compiles, with as few keywords dropped as possible.

    First each subschema is loosened on its own, then together with those that it contains or refers
    to.
    """
    root = _moved(schema)
    for node in _nodes(root):
        _loosen(node, lambda node=node: compiles(_alone(node)))  # type: ignore[misc]
    _loosen_below(root, (), compiles, set())
    return _reference(root, ())


def _moved(schema: Any) -> Any:
    """A copy whose references are valid once it is placed at _ROOT."""
    if isinstance(schema, list):
        return [_moved(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: value if key in _DATA else _moved(value) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = _ROOT + reference[1:].rstrip("/")
    return moved


def _reference(root: Schema, path: Path) -> Schema:
    """A schema equivalent to the subschema at `path`."""
    pointer = "".join(
        "/" + quote(str(key).replace("~", "~0").replace("/", "~1"), safe="~$") for key in path
    )
    return {"$ref": _ROOT + pointer, "$defs": {"root": root}}


def _nodes(node: Any) -> Iterator[Schema]:
    if isinstance(node, dict):
        for _, child in children(node):
            yield from _nodes(child)
        yield node


def _alone(node: Schema) -> Schema:
    """The schema on its own: `true` instead of its subschemas, and no references."""
    alone = {key: value for key, value in node.items() if key in _ORDER and key != "$ref"}
    for key in ("allOf", "anyOf"):
        alone.pop(key, None)
    for path, child in list(children(alone)):
        if isinstance(child, dict):
            key = str(path[0])
            alone[key] = True if len(path) == 1 else copy.copy(alone[key])
            if len(path) > 1:
                alone[key][path[1]] = True
    return alone


def _loosen_below(root: Schema, path: Path, compiles: Compiles, seen: set[Path]) -> None:
    """Makes the schema at `path` compile, starting with those that it contains or refers to."""

    def fits() -> bool:
        return compiles(_reference(root, path))

    node = _at(root, path)
    if not isinstance(node, dict) or path in seen or fits():
        return
    seen.add(path)
    for inner, _ in list(children(node)):
        _loosen_below(root, path + inner, compiles, seen)
    target = node.get("$ref")
    if isinstance(target, str) and target.startswith(_ROOT):
        keys = unquote(target.removeprefix(_ROOT)).split("/")[1:]
        path_there = tuple(key.replace("~1", "/").replace("~0", "~") for key in keys)
        _loosen_below(root, path_there, compiles, seen)
    _loosen(node, fits)


def _at(root: Schema, path: Path) -> Any:
    """The value at `path`; None if there is none."""
    found: Any = root
    for key in path:
        try:
            found = found[int(key) if isinstance(found, list) else key]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return found


def _loosen(node: Schema, fits: Callable[[], bool]) -> None:
    """Drops keywords in _ORDER until the rest compiles, then restores as many as it can."""
    whole = dict(node)
    keys = [key for key in _ORDER for _ in range(_parts(whole, key))]
    dropped: list[str] = []
    while not fits() and len(dropped) < len(keys):
        dropped.append(keys[len(dropped)])
        _replace(node, functools.reduce(_without, dropped, whole))
    for place in reversed(range(len(dropped) - 1)):
        fewer = dropped[:place] + dropped[place + 1 :]
        _replace(node, functools.reduce(_without, fewer, whole))
        if fits():
            dropped = fewer
    _replace(node, functools.reduce(_without, dropped, whole))


def _parts(node: Schema, key: str) -> int:
    """In how many steps a keyword is dropped: one for each part of an allOf."""
    if key == "allOf" and isinstance(node.get(key), list):
        return len(node[key])
    return int(key in node)


def _without(node: Schema, key: str) -> Schema:
    """The schema without a keyword and those that depend on it; an allOf loses its last part."""
    left = {name: value for name, value in node.items() if name != key}
    for dependent in _DEPENDENT.get(key, ()):
        left.pop(dependent, None)
    if key == "allOf" and len(node[key]) > 1:
        left[key] = node[key][:-1]
    rest = node.get("additionalProperties", True)
    if key == "patternProperties" and key in node and rest is not True:
        # Names that matched a pattern now count as additional properties.
        options = [*node[key].values(), *([] if rest is False else [rest])]
        left["additionalProperties"] = {"anyOf": options}
    return left


def _replace(node: Schema, other: Schema) -> None:
    other = dict(other)
    node.clear()
    node.update(other)
