"""Translates JSON Schema's regular expressions (ECMA-262) to the syntax of Rust and llguidance.

The syntaxes are nearly the same. The differences are translated: `\\d` and `\\w` are ASCII, `\\s`
is ECMA's white space; a bracket or `&&` within a class is literal, and so is a brace that is no
quantifier; a dot matches no line terminator, `[]` matches nothing and `[^]` anything. Syntax that
only Rust has, such as `(?i)` or `(?P<name>…)`, is left as it is.
"""

import re
from collections.abc import Iterator

_SPACE = r"\t\n\x0B\x0C\r \u00A0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000\uFEFF"
_CLASSES = {"d": "0-9", "w": "0-9A-Za-z_", "s": _SPACE}
_DOT = r"[^\n\r\u2028\u2029]"
_DOT_ALL = re.compile(
    r"\(\?[a-rt-zA-Z]*s[a-zA-Z]*[-:)]"
)  # Rust's flag that lets a dot match any character
_EMPTY_SETS = {"[]": r"[^\s\S]", "[^]": r"[\s\S]"}

# Each character is read a bounded number of times, as callers send long patterns: a set without an
# end goes on to the pattern's end, and is refused there; names are short.
_TOKEN = re.compile(
    r"""(?P<set>\[\^?(?:\\.|\[:\^?[a-z]{1,16}:\]|[^\]\\])*(?:\]|\\?\Z))
    |(?P<look>\(\?<?[=!])
    |(?P<reference>\\[1-9][0-9]*|\\k<[^>]{0,100}>)
    |(?P<boundary>\\[bB])
    |(?P<escape>\\(?:c[A-Za-z]|[pPuUx]\{[^}]{0,100}\}|.))
    |(?P<dot>\.)
    |(?P<brace>\{(?![0-9]*(?:,[0-9]*)?\}))
    |.""",
    re.VERBOSE | re.DOTALL,
)
_SET_TOKEN = re.compile(
    r"(?P<before>-?)\\(?P<class>[dDwWsS])(?P<after>-?)|\[:\^?[a-z]{1,16}:\]|\\b|\\(?:c[A-Za-z]|.)|--|[\[&~]",
    re.DOTALL,
)


def to_rust(pattern: str) -> str:
    """The same pattern in Rust's syntax."""
    dot = "." if _DOT_ALL.search(pattern) else _DOT
    return "".join(dot if match["dot"] else _token(match) for match in _TOKEN.finditer(pattern))


def widened(pattern: str) -> str:
    """A pattern that matches everything `pattern` does and fits an automaton: no assertions other
    than `^` and `$`, and no backreferences."""
    return "".join(_widened(pattern))


def _widened(pattern: str) -> Iterator[str]:
    depth = 0  # of parentheses, inside an assertion
    for match in _TOKEN.finditer(pattern):
        if depth:
            depth += 1 if match["look"] else {"(": 1, ")": -1}.get(match[0], 0)
        elif match["look"]:
            depth = 1
            yield "(?:)"  # empty, but may have a quantifier
        elif match["boundary"]:
            yield "(?:)"
        elif match["reference"]:
            yield r"[\s\S]*"
        else:
            yield match[0]


def _token(match: re.Match[str]) -> str:
    if match["set"] in _EMPTY_SETS:
        return _EMPTY_SETS[match["set"]]
    if match["set"]:
        return "[" + _SET_TOKEN.sub(_in_set, match[0][1:])
    if match["brace"]:
        return r"\{"
    return _escape(match[0]) if match["escape"] else match[0]


def _escape(escape: str) -> str:
    kind = escape[1]
    if kind in "dws":
        return f"[{_CLASSES[kind]}]"
    if kind in "DWS":
        return f"[^{_CLASSES[kind.lower()]}]"
    if kind == "c" and len(escape) == 3:
        return f"\\x{ord(escape[2]) % 32:02X}"
    # In Rust these escapes are invalid or mean something else.
    return {"\\0": r"\x00", "\\<": "<", "\\>": ">", "\\/": "/"}.get(escape, escape)


def _in_set(match: re.Match[str]) -> str:
    text = match[0]
    if match["class"]:
        kind = match["class"]
        members = _CLASSES[kind.lower()]
        members = members if kind.islower() else f"[^{members}]"
        # Next to a class, a hyphen is literal, not a range.
        return (r"\-" if match["before"] else "") + members + (r"\-" if match["after"] else "")
    if text in ("[", "&", "~"):
        return f"\\{text}"
    if text == "--":
        return r"-\-"
    if text == r"\b":
        return r"\x08"
    return text if text.startswith("[:") else _escape(text)
