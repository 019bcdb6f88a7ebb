"""Patterns of JSON Schema: a constraint allows what they match in JavaScript."""

import json
import subprocess

import pytest

from generator_svc.sequence import ConstraintError
from tests import node
from tests.generator_svc.text_tokens import accepts
from trivium.ecma_regex import to_rust, widened

TEXTS = [
    *("", "a", "b", "ab", "aab", "a-b", "a.b", "_", "-", "1", "12", "123", "٣", "é", "K", "a1_"),
    *("[", "]", "a[", "&", "a&&b", "~", "{", "{a}", "a{b}", "/", "a/b", " ", "\u00a0", "\n", "\t"),
    *(
        "\ufeff",
        "\u3000",
        "foo",
        "a foo b",
        "foobar",
        "x@y.zz",
        ".x@y.zz",
        "a..b@c.de",
        "1.50",
        ".",
    ),
    *("\r", "\u2028", "\u2029", "a\rb", "a\u2028b", "a\nb", "a]"),
    *("-1", "+", "<", ">", "a^", "$5", "aa", "bb", "A", "\\", "d"),
]
SAME = [
    *(
        r"^\d+$",
        r"^\D$",
        r"^\w+$",
        r"^\W$",
        r"^\s$",
        r"^\S$",
        r"^[\d.-]+$",
        r"^[^\d]$",
        r"^[\s\d]$",
    ),
    *(r"^[\w-.]+$", r"^[.-\w]+$", r"^[\w.-]+$", r"^[^\W]$", r"^[^\S]$", r"^[[]$", r"^[a[]+$"),
    *(r"^[a&&b]+$", r"^[~~a]$", r"^[+--]$", r"^\{a\}$", r"^{a}$", r"a{b}", r"^a{2}b?$", r"^\/$"),
    *(r"^a\/b$", r"^[/]$", r"^\<$", r"^[\>]$", r"^\cJ$", r"^[\cI]$", r"^\u0041$", r"^[\u00e9]$"),
    *(r"^\x41$", r"^(?<n>a)b$", r"^(?:a|b)+$", r"^$|^a$", r"(^a$)|(^1$)", r"^[^\]]$", r"^[\b]$"),
    *(r"^.$", r"^a.b", r"^[^]$", r"^[^]*[a-c]$", r"^(a|[])b?$", r"^[^][^a]$", r"^([]a]|b)$"),
    *(r"^[\\d]$", r"^\\$", r"\.", r"^[\^$]", r"^\$\d$", "^é$", "o{2}", r"^\S+@\S+\.\S+$"),
]
WIDER = [
    (r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([a-z]+\.)+[A-Za-z]{2,}$", "foo"),
    (r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$", "a"),
    (r"\bfoo\b", "a"),
    (r"^(?=a)\w+$", "-"),
    (r"^\w+(?<!b)$", "-"),
    (r"^(a|b)\1$", "1"),
    (r"^(?<q>a|b)\k<q>$", "1"),
    (r"^(?:(?=[)\]])|a)b$", "a"),
    (r"^\B.+$", ""),
]


def javascript(patterns):
    """Which of the texts each pattern matches in JavaScript."""
    script = "const [ps, ts] = JSON.parse(require('fs').readFileSync(0));"
    script += "console.log(JSON.stringify(ps.map(p => ts.filter(t => new RegExp(p).test(t)))))"
    command = [node.executable(), "-e", script]
    given = json.dumps([patterns, TEXTS])
    return json.loads(subprocess.run(command, input=given, text=True, capture_output=True).stdout)


def let_through(schema):
    schema = json.dumps({"type": "string"} | schema)
    return [
        text
        for text in TEXTS
        if accepts("json_schema", schema, json.dumps(text, ensure_ascii=False))
        # What JSON has to escape by its code point is never allowed.
        or ("\ufeff" == text and accepts("json_schema", schema, f'"{text}"'))
    ]


def test_pattern_matches_as_in_javascript():
    """ECMA-262's, as JSON Schema says: digits are ASCII, and `[` in a class is a literal."""
    for pattern, expected in zip(SAME, javascript(SAME), strict=True):
        assert expected == let_through({"pattern": pattern}), pattern
        if pattern.startswith("^") and pattern.endswith("$") and "|" not in pattern:
            whole = [text for text in TEXTS if accepts("regex", pattern, text)]
            assert expected == whole, pattern


def test_a_regex_has_the_same_classes():
    """Digits and letters of other scripts do not match, inside character classes or outside."""
    for pattern in (r"\d", r"[\d]", r"\w", r"[\w-]"):
        assert accepts("regex", pattern, "1")
        assert not accepts("regex", pattern, "٣")
        assert not accepts("regex", pattern, "é")
    assert accepts("regex", r"[^\d]", "٣")
    assert accepts("regex", r"\s", "\u3000")


@pytest.mark.parametrize(("pattern", "wrong"), WIDER)
def test_unsupported_parts_of_a_pattern_are_dropped(pattern, wrong):
    """All matches remain allowed and the rest is enforced; in a strict schema it is refused."""
    [expected] = javascript([pattern])
    wider = let_through({"pattern": pattern, "x-guidance": {"lenient": True}})

    assert set() == set(expected) - set(wider)
    assert expected
    assert wrong not in wider
    assert widened(pattern) == widened(widened(pattern))
    with pytest.raises(ConstraintError):
        let_through({"pattern": pattern})


LONG = 65_536
HOSTILE = ("[a", "[^a", "[a\\", "[[:a", "\\k<", "\\p{", "{1,", "(?", "(?<", "\\")


@pytest.mark.timeout(20)  # a fraction of a second, or minutes if time is quadratic
@pytest.mark.parametrize(
    "pattern",
    [
        "(?" + "s" * LONG,
        "{" + "1" * LONG,
        "[" + "-" * LONG,
        *(piece * (LONG // len(piece)) for piece in HOSTILE),
    ],
    ids=lambda pattern: pattern[:4],
)
def test_patterns_are_translated_in_linear_time(pattern: str) -> None:
    """A long pattern delays no other request, however little of it is a pattern."""
    assert to_rust(pattern)
    assert widened(pattern)
