"""GBNF grammars: the constraint accepts exactly the language that the grammar describes."""

import pytest
from llguidance import LLMatcher

from tests.tokenizer_svc.test_grammar import LIBRARIES, PLAIN, TABLES
from tokenizer_svc.request.gbnf import is_gbnf, to_lark

SQL = """
    root ::= select_statement
    select_statement ::= "SELECT " column " from " table " where " condition
    column ::= "col_1 " | "col_2 "
    table ::= "table_1 " | "table_2 "
    condition ::= column "= " number
    number ::= "1 " | "2 "
"""
ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""
JSON = r"""
# llama.cpp's, without numbers
root   ::= object
value  ::= object | array | string | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4})
  )* "\"" ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


def allows(grammar: str, text: str) -> bool:
    matcher = LLMatcher(TABLES[PLAIN], LLMatcher.grammar_from_lark(to_lark(grammar)))
    assert not matcher.get_error(), matcher.get_error()
    token_ids = LIBRARIES[PLAIN].encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (SQL, ["SELECT col_1  from table_2  where col_1 = 1 "], ["SELECT col_3 ", "SELECT"]),
        (ARITHMETIC, ["1 +2 =3\n", "a*(b-1)=c\n", "a_1=1\nb=2\n"], ["1+=2\n", "=1\n", "", "1=a"]),
        (JSON, ['{"a": [true, {"b\\n": null}]}', "{}", '{"é🙂": "\\u00e9"}'], ["[]", '{"a"}', "{"]),
        ('root ::= name "b"\nname ::= [a-z]+', ["ab", "bb", "aabb"], ["b", "a"]),
        ('root ::= "abc" | [a-z] "b"', ["abc", "ab", "xb"], ["a", "abb"]),
        ('root ::= Foo foo | start\nFoo ::= "a"\nfoo ::= "b"\nstart ::= "s"', ["ab", "s"], ["ba"]),
        ('root ::= "if" 1st-rule\n1st-rule ::= "1"{2,3}', ["if11", "if111"], ["if1", "if1111"]),
        (r'root ::= "\u0041\x42" [\u00e9-\u00ea] "\U0001F642"', ["ABé🙂"], ["ABe🙂"]),
        (r"root ::= [\-a^] [\]\[] [a-]", ["-]a", "^[-"], ["b]a"]),
        ('root ::= . "é" [^é]', ["ééx", "\nén"], ["aéé"]),
        ('root ::= "" | "a" root "b"', ["", "aabb"], ["aab", "ba"]),
        ('root ::= "a" # a comment ::= "b"\n   | "c"', ["a", "c"], ["b"]),
        ('root ::= ("ab" | "c"){2,} "."?', ["abc", "cc.", "ababab"], ["ab", "c."]),
    ],
)
def test_grammars_are_enforced(grammar: str, right: list[str], wrong: list[str]) -> None:
    """Grammars are llama.cpp's, ones from vLLM's docs, and ones that a lexer would get wrong."""
    assert is_gbnf(grammar)
    assert [] == [text for text in right if not allows(grammar, text)]
    assert [] == [text for text in wrong if allows(grammar, text)]


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        ("root ::= x", "no rule 'x'"),
        ('rot ::= "x"', "no rule 'root'"),
        ('root ::= "a"\nroot ::= "b"', "defined twice"),
        ('root ::= "a"\n  ("b"', "line 2"),
        ('root ::= "a" )', "line 1"),
        ('root ::= "a\n"', "line 1"),
        ('root ::= (= "a") "b"', "'= "),
        ("root ::= [z-a]", "z-a"),
        (r'root ::= "\q"', r"\\q"),
        (r'root ::= "\uD800"', r"\\uD800"),
        ('"x" root ::= "a"', "line 1"),
        ("root ::= {2}", "line 1"),
        ("root ::= " + "(" * 10_000 + ")" * 10_000, "parentheses"),
    ],
)
def test_grammar_errors_name_the_line_or_rule(grammar: str, says: str) -> None:
    """The error names the line or the rule."""
    with pytest.raises(ValueError, match=says):
        to_lark(grammar)


@pytest.mark.parametrize(
    "grammar", ['start: "::="', "start: /a ::= b/", '// root ::= x\nstart: "a"']
)
def test_lark_is_not_mistaken_for_gbnf(grammar: str) -> None:
    """Lark that merely mentions GBNF's syntax stays Lark."""
    assert not is_gbnf(grammar)


@pytest.mark.timeout(20)  # a fraction of a second, or minutes if time is quadratic
@pytest.mark.parametrize(
    "rest", ["[a" * 30_000, "[\\\n" * 20_000, '"' + '\\"' * 30_000, '"a"{1,' + " " * 60_000]
)
def test_time_is_linear(rest: str) -> None:
    """Long grammars in which sets, strings and counts have no end are refused at once."""
    with pytest.raises(ValueError, match="unexpected"):
        to_lark(f"root ::= {rest}")
