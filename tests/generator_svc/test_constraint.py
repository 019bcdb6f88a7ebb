"""Token masks: what they allow fits the constraint, and what fits they allow."""

import json
import math
import random
import re
from collections import Counter

import jsonschema
import numpy as np
import pytest

from generator_svc.constraint.json_schema import prepared, prepared_lark
from generator_svc.constraint.llguidance import TokenTable
from generator_svc.sequence import ConstraintError
from tests.generator_svc.schema_draw import draw_schema
from tests.generator_svc.text_tokens import EXTRA_IDS, accepts, compiled, text_tokens, token_table

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "label": {"type": "string"}},
    "required": ["x", "label"],
    "additionalProperties": False,
}


def _written(state, seed, most=300):
    """What a random model writes; None if it does not end."""
    tokens = text_tokens()
    draw = np.random.default_rng(seed)
    written = []
    for _ in range(most):
        logits = draw.normal(size=tokens.size) * 3
        logits[tokens.closers] += 6
        logits[tokens.eos] += 12
        logits[~state.allowed()] = -np.inf
        token_id = int(logits.argmax())
        if token_id == tokens.eos:
            return tokens.decode(written)
        state.accept(token_id)
        written.append(token_id)
    return None


def _fits(schema, answer):
    kind = jsonschema.Draft202012Validator
    return kind(schema, format_checker=kind.FORMAT_CHECKER).is_valid(json.loads(answer))


@pytest.mark.parametrize("part", range(4))
def test_whatever_a_random_model_writes_fits_its_schema(part):
    """For hundreds of schemas; refused ones are unsatisfiable or cannot be enforced."""
    outcomes = Counter()
    for seed in range(250 * part, 250 * part + 250):
        schema = draw_schema(random.Random(seed))
        try:
            state = compiled("json_schema", json.dumps(schema)).new_state()
        except ConstraintError as error:
            outcomes[error.code] += 1
            continue
        answer = _written(state, seed)
        outcomes["unfinished" if answer is None else "finished"] += 1

        assert answer is None or _fits(schema, answer), (seed, schema, answer)
    assert outcomes["finished"] > 175, outcomes
    assert {"finished", "unfinished", "invalid_json_schema"} >= outcomes.keys()


@pytest.mark.parametrize(
    "regex",
    ["[ab]{3,5}c", "(a+)+$", "^x?(yes|no)$", "[^a-z]{2,4}", r"\d{1,3}(\.\d{1,3}){3}", "é+🫠", ""],
)
def test_whatever_a_random_model_writes_matches_its_regex(regex):
    """As a whole, from the first character to the last."""
    answers = [_written(compiled("regex", regex).new_state(), seed) for seed in range(20)]
    finished = [answer for answer in answers if answer is not None]

    assert len(finished) > 10
    assert all(re.fullmatch(regex, answer) for answer in finished), finished


def test_whatever_a_random_model_writes_matches_its_grammar():
    """A Lark grammar with recursion: sums in balanced parentheses."""
    lark = 'start: sum\nsum: item ("+" item)*\nitem: /[0-9]{1,3}/ | "(" sum ")"'
    answers = [_written(compiled("lark", lark).new_state(), seed) for seed in range(40)]
    finished = [answer for answer in answers if answer is not None]

    assert len(finished) > 20
    for answer in finished:
        assert re.fullmatch(r"[0-9+()]+", answer)
        assert isinstance(eval(re.sub(r"\b0+(?=\d)", "", answer)), int)


@pytest.mark.parametrize(
    ("answer", "fits"),
    [
        ('{"x":1,"label":"é"}', True),
        ('{"x": 1, "label": "a \\" \\n"}', True),
        ('{\n  "x": -12,\n  "label": ""\n}', True),
        ('{"x":1}', False),
        ('{"x":1.5,"label":""}', False),
        ('{"label":"","x":1}', False),  # properties come in the schema's order
        ('{"x":1,"label":"","y":2}', False),
        (' {"x":1,"label":""}', False),
        ('{"x":1,"label":""}\n', False),
    ],
)
def test_json_may_be_indented_but_not_surrounded(answer, fits):
    """The usual ways to format JSON are allowed."""
    assert fits is accepts("json_schema", json.dumps(POINT), answer)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", '{"type": "array"}'),
        ("lark", 'start: %json {"type": "array"}'),
        ("lark", "start: %json{}"),
        ("lark", 'start: %json {"type": "array", "x-guidance": {"whitespace_pattern": " *"}}'),
        ("json_schema", '{"type": "array", "x-guidance": {"whitespace_pattern": " *"}}'),
    ],
)
def test_whitespace_is_bounded(kind, text):
    """One newline and its indentation are allowed; a model cannot write whitespace forever."""
    assert accepts(kind, text, "[\n" + " " * 20 + "]")
    assert not accepts(kind, text, "[" + " " * 21 + "]")
    assert not accepts(kind, text, "[\n\n]")
    assert not accepts(kind, text, "[\t]")


def test_schemas_in_lark_are_not_found_in_strings_or_comments():
    """Not in strings, patterns or comments; what follows is left as it is."""
    lark = 'start: "%json {}" /%json {2}/ a // %json {}\na: %json {"type": "null"} "z"'
    other = lark.replace(' a // %json {}\na: %json {"type": "null"} "z"', "")

    assert prepared_lark(lark).startswith(other + " a // %json {}\na: %json ")
    assert prepared_lark(lark).endswith('} "z"')
    assert accepts("lark", lark, "%json {}%json  nullz")
    assert 'start: %json {"a": }' == prepared_lark('start: %json {"a": }')


@pytest.mark.parametrize("least", ["minimum", "exclusiveMinimum"])
@pytest.mark.parametrize("most", ["maximum", "exclusiveMaximum"])
@pytest.mark.parametrize("form", ["plain", "lark", "merged"])
def test_bounds_of_numbers_hold(least, most, form):
    """Also exclusive bounds that are whole numbers, which llguidance alone does not enforce."""
    answers = "-1 -0.5 -0 0 0.0 0.25 0.5 0.50 0.9 1 1.0 1.5 2 2.5 3 3.0 3.25 3.5 4 1e0 30e-1"
    ranges = [(0, 0.5), (-0.5, 0), (3, 3.5), (2.5, 3), (3, 4), (0, 3), (0, 1), (0.25, 0.5)]
    for low, high in ranges:
        schema = {"type": "number", least: low, most: high}
        kind, text = "json_schema", json.dumps(schema)
        if form == "lark":
            kind, text = "lark", f"start: %json {text}"
        elif form == "merged":
            text = json.dumps({"allOf": [{"type": "number", least: low}, {most: high}]})
        valid = jsonschema.Draft202012Validator(schema).is_valid
        for answer in answers.split():
            assert valid(json.loads(answer)) or not accepts(kind, text, answer), (schema, answer)
        assert accepts(kind, text, str(round((low + high) / 2, 3)))


def test_constants_are_not_treated_as_schemas():
    """A constant that looks like a schema stays as it is."""
    text = '{"const": {"exclusiveMinimum": 3, "maximum": 3.5}}'

    assert text == prepared(text)
    assert accepts("json_schema", text, '{"exclusiveMinimum":3,"maximum":3.5}')


def test_escaped_property_name_fits_the_same_schema():
    """An escaped name is the same property to parsers, so it has to fit the same schema."""
    schema = {"properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}}
    schema = json.dumps(schema | {"type": "object"})

    assert accepts("json_schema", schema, '{"a":null,"b":1}')
    assert not accepts("json_schema", schema, '{"a":null,"\\u0061":1}')


def test_ids_without_a_token_are_never_allowed():
    """A graph's vocabulary may be larger than the tokenizer's."""
    tokens = text_tokens()
    for kind, text in [("regex", r"(.|\n)*"), ("lark", "start: <[*]>*")]:
        allowed = compiled(kind, text).new_state().allowed()

        assert (tokens.size,) == allowed.shape
        assert allowed[3:259].any()
        assert not allowed[-EXTRA_IDS:].any()


def test_graph_may_have_fewer_tokens_than_the_tokenizer():
    """The mask has the graph's width."""
    tokens = text_tokens()
    table = TokenTable(tokens.file, tokens.known - 10, [tokens.eos])

    assert tokens.known - 10 == table.vocabulary_size
    assert tokens.known == table.tokenizer.vocab_size


def test_an_end_that_the_graph_cannot_generate_is_unsupported():
    """Otherwise no token would be left once a constrained text is complete."""
    tokens = text_tokens()
    last = tokens.known - 1

    assert {tokens.eos} == TokenTable(tokens.file, last, [tokens.eos, last]).end_token_ids
    with pytest.raises(ValueError, match="none of the model's tokens ends a text"):
        TokenTable(tokens.file, last, [last])


def test_control_tokens_come_only_where_a_grammar_names_them():
    """Plain text cannot become one."""
    tool = text_tokens().tokenizer.token_to_id("<|tool|>")
    regex = compiled("regex", r"(.|\n)*").new_state()
    lark = compiled("lark", 'start: <|tool|> "x"').new_state()

    assert not regex.allowed()[tool]
    assert [tool] == np.flatnonzero(lark.allowed()).tolist()


def test_a_complete_text_allows_only_its_end():
    """And each choice of a request has its own state."""
    tokens = text_tokens()
    constraint = compiled("regex", "ab")
    one, other = constraint.new_state(), constraint.new_state()
    for token_id in tokens.encode("ab"):
        one.accept(token_id)

    assert {tokens.eos} == constraint.end_token_ids
    assert [tokens.eos] == np.flatnonzero(one.allowed()).tolist()
    assert not other.allowed()[tokens.eos]


@pytest.mark.parametrize(
    ("kind", "text", "code", "message"),
    [
        ("json_schema", "{", "invalid_json_schema", "EOF"),
        ("json_schema", "[1]", "invalid_json_schema", "object"),
        ("json_schema", "false", "invalid_json_schema", "object"),
        ("json_schema", '{"type": "strin"}', "invalid_json_schema", "strin"),
        ("json_schema", '{"type": "string", "format": "nosuch"}', "invalid_json_schema", "nosuch"),
        ("json_schema", '{"not": {}}', "invalid_json_schema", "not"),
        ("json_schema", '{"enum": []}', "invalid_json_schema", "nsatisfiable"),
        ("json_schema", '{"$ref": "#/$defs/x"}', "invalid_json_schema", "#/$defs/x|/\\$defs/x"),
        ("json_schema", '{"$ref": "http://localhost:1/x"}', "invalid_json_schema", "localhost:1"),
        ("json_schema", '{"a":' * 200 + "1" + "}" * 200, "json_schema_too_complex", "recursion"),
        ("json_schema", json.dumps({"enum": list(range(10**5))}), "json_schema_too_complex", "big"),
        ("regex", "(a", "invalid_value", "regex"),
        ("regex", "(?=a)b", "invalid_value", "look"),
        ("regex", "(" * 9_000 + ")" * 9_000, "invalid_value", "regex"),
        ("lark", "start: nosuch", "invalid_value", "nosuch"),
        ("lark", "begin: X", "invalid_value", "start"),
        ("lark", "start: <|nosuch|>", "invalid_value", "nosuch"),
    ],
)  # fmt: skip
def test_unenforceable_constraint_is_refused_with_its_location(kind, text, code, message):
    """It is never served unconstrained."""
    with pytest.raises(ConstraintError, match=message) as caught:
        compiled(kind, text).new_state().allowed()

    assert code == caught.value.code
    assert len(caught.value.message) < 600


def test_schema_true_allows_anything():
    """As in JSON Schema."""
    assert accepts("json_schema", "true", '[1, {"a": null}]')


def test_unsupported_tokenizer_is_named(tmp_path):
    """For instance a word-level one; the message names the file."""
    file = tmp_path / "tokenizer.json"
    file.write_text('{"model": {"type": "WordLevel", "vocab": {"a": 0}}}')
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        TokenTable(file, 10, [0])


def test_ambiguous_grammar_fails_instead_of_taking_hours():
    """Here the number of parses multiplies with each character."""
    tokens = text_tokens()
    state = compiled("lark", 'start: e\ne: e e | "a" | e e e | ').new_state()
    [a] = tokens.encode("a")
    with pytest.raises(ConstraintError) as caught:
        for _ in range(10_000):
            assert state.allowed()[a]
            state.accept(a)

    assert "json_schema_too_complex" == caught.value.code


def test_masks_do_not_depend_on_earlier_requests():
    """What one request's matcher cached or used up never affects another's."""
    regex = r"(.|\n)*a(.|\n){12}"
    first = [_written(compiled("regex", regex).new_state(), seed, 60) for seed in range(3)]
    again = [_written(compiled("regex", regex).new_state(), seed, 60) for seed in range(3)]

    assert first == again


def test_llguidance_has_the_tokenizers_tokens():
    """llguidance's table has the same tokens as the tokenizer file."""
    table, tokens = token_table(), text_tokens()
    text = 'Some "text", é🫠\n'

    assert text.encode() == table.tokenizer.decode_bytes(tokens.encode(text))
    assert math.inf > table.num_tokens == tokens.known
