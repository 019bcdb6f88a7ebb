"""Translates GBNF, the grammars of llama.cpp, vLLM and SGLang, to llguidance's variant of Lark.

Also called EBNF; xgrammar's is the same except for its lookaheads, which are refused. Every
terminal becomes a single character: Lark's lexer takes the longest match and never a shorter one,
so `[a-z]+ "b"` as two terminals would never end.
"""

import json
import re
from collections.abc import Sequence

MAX_DEPTH = 64  # of parentheses

_RULE = re.compile(r"^[ \t]*[a-zA-Z0-9_-]+[ \t]*::=", re.MULTILINE)
_TOKEN = re.compile(
    r"""(?:\s|\#[^\n]*)*(?:
    (?P<rule>[a-zA-Z0-9_-]+)\s*::=
    |(?P<name>[a-zA-Z0-9_-]+)
    |"(?P<text>(?:\\.|[^"\\\n])*)"
    |\[(?P<set>\^?(?:\\.|[^\]\\\n])*)\]
    |(?P<repeat>[*+?]|\{\s*[0-9]+\s*(?:,\s*(?:[0-9]+\s*)?)?\})
    |(?P<sign>[|().])
    |(?P<end>$)
    |(?P<other>["\[](?:\\.|[^\\\n])*|.))""",  # one that has no end is not searched for it again
    re.VERBOSE | re.DOTALL,
)
_CHARACTER = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))|(.)", re.DOTALL
)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "b": "\b", "a": "\a"}
_LITERAL_ESCAPES = frozenset("\"'\\[]-^/.?*+(){}|$ ")


def is_gbnf(grammar: str) -> bool:
    """Whether a grammar is GBNF: it has `::=` where Lark has a colon."""
    return _RULE.search(grammar) is not None


def to_lark(grammar: str) -> str:
    """The same grammar in Lark; raises ValueError that says what is wrong with it."""
    return _Parser(grammar).lark()


class _Parser:
    """Parses a grammar from its first token to its last."""

    def __init__(self, grammar: str) -> None:
        self._grammar = grammar
        self._tokens = list(_TOKEN.finditer(grammar))
        self._position = 0
        self._depth = 0
        rules = [match["rule"] for match in self._tokens if match["rule"]]
        self._names = {name: f"rule_{number}" for number, name in enumerate(rules)}
        self._names["root"] = "start"
        if len(rules) != len(set(rules)):
            raise ValueError("a rule is defined twice")
        if "root" not in rules:
            raise ValueError("there is no rule 'root'")

    def lark(self) -> str:
        lines = []
        while not self._token("end"):
            name = self._token("rule")
            if not name:
                raise self._unexpected()
            self._position += 1
            lines.append(f"{self._names[name]}: {self._options()}\n")
        return "".join(lines)

    def _token(self, kind: str) -> str:
        """The next token if it is of this kind, else ""; the end of the grammar is "end"."""
        match = self._tokens[self._position]
        return match[kind] or ("end" if kind == "end" and match.lastgroup == "end" else "")

    def _options(self) -> str:
        options = [self._sequence()]
        while self._token("sign") == "|":
            self._position += 1
            options.append(self._sequence())
        return " | ".join(options)

    def _sequence(self) -> str:
        items: list[str] = []
        while (item := self._item()) is not None:
            repeat = self._token("repeat")
            if repeat:
                self._position += 1
                item = f"({item}){''.join(repeat.split())}"
            items.append(item)
        return " ".join(items) or '""'

    def _item(self) -> str | None:
        """The next item; None at the end of a sequence."""
        match = self._tokens[self._position]
        kind = match.lastgroup
        if kind in ("rule", "end") or (kind == "sign" and match["sign"] in "|)"):
            return None
        if kind == "sign" and match["sign"] == "(":
            return self._group()
        self._position += 1
        if kind == "name" and match["name"] in self._names:
            return self._names[match["name"]]
        if kind == "name":
            raise ValueError(f"there is no rule '{match['name']}'")
        if kind == "text":
            return " ".join(map(json.dumps, _characters(match["text"]))) or '""'
        if kind == "set":
            return f"/{_set(match['set'])}/"
        if kind == "sign":
            return "/(?s:.)/"
        self._position -= 1
        raise self._unexpected()

    def _group(self) -> str:
        self._position += 1
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels of parentheses")
        options = self._options()
        if self._token("sign") != ")":
            raise self._unexpected()
        self._position += 1
        self._depth -= 1
        return f"({options})"

    def _unexpected(self) -> ValueError:
        match = self._tokens[self._position]
        start = match.end() if match.lastgroup == "end" else match.start(match.lastgroup or 0)
        line = self._grammar.count("\n", 0, start) + 1
        found = "end" if match.lastgroup == "end" else repr(self._grammar[start : start + 20])
        return ValueError(f"line {line} has an unexpected {found}")


def _characters(text: str) -> list[str]:
    """The characters of a literal, with escapes resolved."""
    characters = []
    for match in _CHARACTER.finditer(text):
        code = match[1] or match[2] or match[3]
        if code:
            if int(code, 16) > 0x10FFFF or 0xD800 <= int(code, 16) < 0xE000:
                raise ValueError(f"{match[0]} is not a character")
            characters.append(chr(int(code, 16)))
        elif match[4] is None:
            characters.append(match[5])
        elif match[4] in _ESCAPED or match[4] in _LITERAL_ESCAPES:
            characters.append(_ESCAPED.get(match[4], match[4]))
        else:
            raise ValueError(f"{match[0]} is not an escape sequence")
    return characters


def _set(text: str) -> str:
    """A character class in regex syntax."""
    negated = text.startswith("^")
    members = [match[0] for match in _CHARACTER.finditer(text[negated:])]
    ranges, position = [], 0
    while position < len(members):
        is_range = members[position + 1 : position + 2] == ["-"] and position + 2 < len(members)
        ranges.append(
            _range(members[position : position + 3 : 2] if is_range else [members[position]])
        )
        position += 3 if is_range else 1
    if not ranges:
        return r"(?s:.)" if negated else r"[^\x00-\u{10FFFF}]"
    return f"[{'^' * negated}{''.join(ranges)}]"


def _range(ends: Sequence[str]) -> str:
    codes = [ord(character) for end in ends for character in _characters(end)]
    if codes[0] > codes[-1]:
        raise ValueError(f"the range {'-'.join(ends)} is empty")
    return "-".join(f"\\u{{{code:X}}}" for code in codes)
