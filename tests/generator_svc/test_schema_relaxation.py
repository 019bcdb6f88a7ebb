"""Lenient schemas: all that fits is allowed, and all that can be enforced is enforced."""

import json
import random
from collections import Counter

import jsonschema
import pytest

from generator_svc.constraint.sandbox import compilable_text
from generator_svc.constraint.schema_relaxation import DROPPED, FORMATS, MAX_MULTIPLE, children
from generator_svc.sequence import ConstraintError
from tests.compatibility import SCHEMA_KEYWORDS
from tests.generator_svc.sample_schemas import SAMPLES, written
from tests.generator_svc.schema_draw import draw_schema
from tests.generator_svc.test_constraint import _written
from tests.generator_svc.text_tokens import accepts, compiled, token_table

LENIENT = {"x-guidance": {"lenient": True}}


def kept(schema, kind="json_schema"):
    """The text of what is enforced of a schema."""
    return compilable_text(token_table(), kind, json.dumps(schema | LENIENT))


@pytest.mark.parametrize(
    ("name", "schema", "right", "wrong"), SAMPLES, ids=lambda value: str(value)[:20]
)
def test_schemas_of_real_programs(name, schema, right, wrong):
    """What fits is allowed; what violates a rule that can be enforced is not."""
    text = kept(schema)
    valid = jsonschema.Draft202012Validator(
        {"components": {"schemas": {"Owner": {}}}} | schema,
        format_checker=jsonschema.FormatChecker(),
    ).is_valid
    for value in right:
        assert valid(value), value
        assert accepts("json_schema", text, written(value)), value
    for value in wrong:
        assert not valid(value), value
        assert not accepts("json_schema", text, written(value)), value


def augmented(schema, draw):
    """The schema with keywords that cannot be enforced, added in random places."""
    schema = json.loads(json.dumps(schema))
    nodes, rest = [], [schema]
    while rest:
        node = rest.pop()
        if isinstance(node, dict):
            nodes.append(node)
            rest += [child for _, child in children(node)]
    for node in draw.sample(nodes, min(len(nodes), 3)):
        node |= draw.choice(EXTRAS)
        if draw.random() < 0.3 and node is not schema:  # the root has the definitions
            whole = dict(node)
            node.clear()
            node["oneOf"] = [whole, {"type": "string", "maxLength": 1}, {"required": ["zz"]}]
    return schema


STEPS = [
    # A schema, what it allows when lenient, and what it still does not allow.
    ({"type": "array", "uniqueItems": True, "items": {"type": "integer"}}, [[1, 1]], [["a"], {}]),
    ({"type": "integer", "not": {"const": 3}, "minimum": 0}, [3], [-1]),
    ({"type": "array", "contains": {"const": 1}, "maxItems": 1}, [[2]], [[2, 2]]),
    (
        {
            "type": "object",
            "propertyNames": {"maxLength": 1},
            "additionalProperties": {"type": "null"},
        },
        [{"ab": None}],
        [{"ab": 1}],
    ),
    ({"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 0}]}, [1, -1], [-1.5, "a"]),
    (
        {
            "oneOf": [{"minimum": 0}, {"maximum": 5}],
            "anyOf": [{"type": "integer"}, {"type": "null"}],
        },
        [3, None],
        [1.5],
    ),
    ({"type": "string", "format": "password", "maxLength": 2}, ["ab"], ["abc"]),
    ({"type": "string", "format": "uuid", "pattern": "(?!a)"}, [], ["a"]),
    ({"type": "string", "pattern": "(", "maxLength": 2}, ["ab"], ["abc", 1]),
    ({"type": "number", "multipleOf": 99991, "minimum": 2}, [3], [1]),
    ({"type": "number", "multipleOf": 1e-20, "minimum": 2}, [3], [1]),
    (
        {"type": "object", "properties": {"a": {"type": "integer"}}, "minProperties": 2},
        [{"a": 1}],
        [{"a": "1"}],
    ),
    (
        {
            "properties": {"a": {"$ref": "#/$defs/gone"}, "b": {"$ref": "https://example.com/b"}},
            "type": "object",
            "required": ["b"],
        },
        [{"a": 1, "b": {}}],
        [{"a": 1}],
    ),
    (
        {
            "$ref": "#/$defs/list",
            "$defs": {
                "list": {
                    "type": "object",
                    "properties": {
                        "next": {"$ref": "#/$defs/list", "type": "object"},
                        "value": {"type": "integer", "not": {}},
                    },
                }
            },
        },
        [{"next": {"next": {}, "value": 1}}],
        [{"next": {"next": {"value": "1"}}}, []],
    ),
    (
        {
            "allOf": [
                {"patternProperties": {"^a": {"type": "integer"}}, "type": "object"},
                {"patternProperties": {"b$": {"type": "integer"}}},
            ]
        },
        [{"ab": 1}],
        [{"ab": "1"}, []],
    ),
    ({"type": "object", "properties": {"x": {"enum": []}}, "required": ["x"]}, [{"x": 1}], [{}, 1]),
    ({"const": None, "if": {}}, [None], [1]),
    ({"type": "null", "$dynamicAnchor": "node"}, [None], [1]),
    ({"$schema": "https://example.com/mine", "type": "integer"}, [1], ["a"]),
]


@pytest.mark.parametrize(("schema", "wider", "wrong"), STEPS, ids=lambda value: str(value)[:40])
def test_only_the_unenforceable_keyword_is_dropped(schema, wider, wrong):
    """A strict schema is refused."""
    text = kept(schema)

    assert all(accepts("json_schema", text, written(value)) for value in wider)
    assert not any(accepts("json_schema", text, written(value)) for value in wrong)
    if schema.get("multipleOf") != 99991:  # this one can be enforced, in a second
        with pytest.raises(ConstraintError):
            compiled("json_schema", json.dumps(schema)).new_state().allowed()


def test_lenient_schemas_in_lark_are_relaxed_separately():
    """A lenient one is relaxed, another one is left as it is or refused."""
    bad = {"type": "integer", "not": {"const": 1}}
    hard = {"type": "number", "multipleOf": 1e-20, "minimum": 0}
    lark = f'start: "a" %json {json.dumps(hard | LENIENT)} | "b" %json {json.dumps(bad | LENIENT)}'
    text = compilable_text(token_table(), "lark", lark + ' | "c" %json {"type": "null"}')

    assert [True] * 3 == [accepts("lark", text, answer) for answer in ("a0.5", "b1", "cnull")]
    assert [False] * 3 == [accepts("lark", text, answer) for answer in ("a-1", "b1.5", "c1")]
    with pytest.raises(ConstraintError):
        compilable_text(token_table(), "lark", lark + f' | "c" %json {json.dumps(bad)}')


def test_too_many_optional_fields_are_not_enforced():
    """With more optional fields than a grammar may have, they are not enforced."""
    wide = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(200)}}
    text = compilable_text(token_table(), "lark", f"start: %json {json.dumps(wide | LENIENT)}")

    assert accepts("lark", text, '{"p199":null,"p3":1}')
    assert not accepts("lark", text, "[]")


def test_docs_list_what_is_dropped():
    """Every keyword and format that the code handles specially is on it."""
    page = " ".join(f"{row.keywords} {row.strict} {row.otherwise}" for row in SCHEMA_KEYWORDS)

    assert [] == [word for word in DROPPED | FORMATS if f"`{word}`" not in page]
    assert f"{MAX_MULTIPLE:,}" in page


@pytest.mark.parametrize("name", sorted(FORMATS | {"password", "int64", "binary", "regex", "iri"}))
def test_listed_formats_are_those_that_can_be_enforced(name):
    """No format is missing, and none is listed that cannot be enforced."""
    schema = {"type": "string", "format": name}
    try:
        compiled("json_schema", json.dumps(schema))
        is_known = True
    except ConstraintError:
        is_known = False

    assert is_known is (name in FORMATS)
    assert is_known is not accepts("json_schema", kept(schema), '"? ?"')


EXTRAS = [
    {"not": {"type": "string", "maxLength": 2}},
    {"not": {"required": ["a"]}},
    {"if": {"type": "object"}, "then": {"required": ["b"]}, "else": {"minLength": 3}},
    {"uniqueItems": True},
    {"contains": {"type": "integer"}, "minContains": 1},
    {"propertyNames": {"maxLength": 4}},
    {"dependentRequired": {"a": ["b"]}},
    {"dependentSchemas": {"a": {"required": ["name"]}}},
    {"unevaluatedProperties": False},
    {"format": "password"},
    {"pattern": "^(?!x)"},
    {"pattern": "(?<!b)$", "minLength": 1},
    {"multipleOf": 1e-17},
    {"minProperties": 1},
    {"maxProperties": 2},
    {"patternProperties": {"^a": {}, "e$": {"type": ["integer", "string", "object"]}}},
    {"minimum": -1e300},
    {"allOf": [{"minProperties": 1}, {"pattern": "^(?=.)"}]},
    {"$schema": "https://example.com/other"},
]


@pytest.mark.parametrize("part", range(4))
def test_relaxed_schema_accepts_whatever_fits(part):
    """For hundreds of schemas with added keywords that cannot be enforced, and a random model's
    answers to the original schemas: those that a validator accepts are allowed."""
    outcomes = Counter()
    for seed in range(100 * part, 100 * part + 100):
        draw = random.Random(seed)
        schema = draw_schema(draw)
        try:
            exact = compiled("json_schema", json.dumps(schema))
        except ConstraintError:
            continue
        harder = augmented(schema, draw)
        text = kept(harder)
        valid = jsonschema.Draft202012Validator(harder).is_valid
        for attempt in range(3):
            answer = _written(exact.new_state(), 7 * seed + attempt)
            if answer is None:
                continue
            fits, passes = valid(json.loads(answer)), accepts("json_schema", text, answer)
            outcomes[fits, passes] += 1

            assert passes or not fits, (seed, harder, answer, text)
    assert outcomes[True, True] > 60, outcomes
    assert 0 == outcomes[True, False]


@pytest.mark.parametrize("part", range(2))
def test_enforceable_schema_is_not_relaxed(part):
    """Lenient or not, what a random model writes fits it."""
    finished = 0
    for seed in range(150 * part, 150 * part + 150):
        schema = draw_schema(random.Random(seed))
        try:
            compiled("json_schema", json.dumps(schema))
        except ConstraintError:
            continue
        answer = _written(compiled("json_schema", kept(schema)).new_state(), seed)
        finished += answer is not None

        assert answer is None or jsonschema.Draft202012Validator(schema).is_valid(
            json.loads(answer)
        )
    assert finished > 75
