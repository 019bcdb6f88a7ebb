"""Strict schemas: an answer that does not fit cannot be generated, or the schema is refused."""

import json

import pytest

from generator_svc.sequence import ConstraintError
from tests.generator_svc.text_tokens import accepts, compiled

LENIENT = {"x-guidance": {"lenient": True}}


def refused(schema, message):
    """Whether a strict schema is refused with this message, on its own and in a grammar."""
    for kind, text in (("json_schema", "{}"), ("lark", "start: call\ncall: %json {}")):
        with pytest.raises(ConstraintError, match=message) as caught:
            compiled(kind, text.replace("{}", json.dumps(schema)))
        is_place_named = kind != "lark" or "at 2(" in caught.value.message
        if not is_place_named:
            return False
    return True


@pytest.mark.parametrize(
    ("schema", "few"),
    [
        ({"minProperties": 2}, '{"a":1,"a":2}'),
        ({"minProperties": 3, "required": ["a"]}, '{"a":1,"b":1,"b":1}'),
        (
            {"minProperties": 2, "patternProperties": {"^x": {}}, "additionalProperties": False},
            '{"x":1,"x":2}',
        ),
        ({"allOf": [{"minProperties": 2}, {"additionalProperties": {}}]}, '{"a":1,"a":2}'),
    ],
)
def test_a_property_that_is_written_twice_counts_once(schema, few):
    """Names that a schema leaves open may be repeated, so an exact count of them is refused."""
    schema = {"type": "object"} | schema

    assert refused(schema, "minProperties")
    assert accepts("json_schema", json.dumps(schema | LENIENT), few)
    assert not accepts("json_schema", json.dumps(schema | LENIENT), "{}")


@pytest.mark.parametrize("least", [1, 2, 3])
def test_properties_are_counted_where_their_names_differ(least):
    """The required ones, and one other."""
    names = ["a", "b"][: least - 1]
    schema = {"type": "object", "required": names, "minProperties": least}
    text = json.dumps(schema)

    assert accepts("json_schema", text, json.dumps(dict.fromkeys(names, 1) | {"c": 1}))
    assert not accepts("json_schema", text, json.dumps(dict.fromkeys(names, 1)))


LARGE = 2**53 + 1


@pytest.mark.parametrize(
    ("value", "other"),
    [
        ("a\0b", "ab"),
        ("a\x1bb", "ab"),
        ("a\x7fb", "ab"),
        ({"k": ["\x01"]}, {"k": [""]}),
        (LARGE, LARGE - 1),
        ([-LARGE], [1 - LARGE]),
        (2**70, 1180591620717411200000),
        (0.48785665652414756, 0.4878566565241475),
    ],
)
@pytest.mark.parametrize("keyword", ["const", "enum"])
def test_value_that_cannot_be_generated_is_refused(keyword, value, other):
    """Rather than replaced by another one; a lenient schema drops the keyword."""
    schema = {keyword: value if keyword == "const" else [1, value]}

    assert refused(schema, keyword)
    assert accepts("json_schema", json.dumps(schema | LENIENT), json.dumps(other))


@pytest.mark.parametrize("value", ['\t\n\f\r\b"\\/', "\x85\u2028é🫠", 2**53, -(2**62), 1e22, 1.5])
def test_other_values_are_generated_exactly(value):
    """Whatever escape or precision they need."""
    text = json.dumps({"enum": [{"k": value}]})

    assert accepts(
        "json_schema",
        text,
        json.dumps({"k": value}, ensure_ascii=False).replace("1e+22", "1" + "0" * 22),
    )


@pytest.mark.parametrize("kind", ["integer", "number"])
@pytest.mark.parametrize(
    ("bounds", "right", "wrong"),
    [
        ({"maximum": 2**53 + 3}, [2**53 + 2, 0, -5], [2**53 + 4]),
        ({"minimum": 2**53 + 1}, [2**53 + 2, 2**62], [2**53, 0]),
        ({"minimum": LARGE, "exclusiveMinimum": LARGE}, [2**53 + 2], [2**53, LARGE]),
        ({"exclusiveMaximum": LARGE, "maximum": 9e18}, [2**53, 7], [LARGE]),
        ({"exclusiveMaximum": 2**63 - 1}, [1], [2**63 - 1]),
        ({"minimum": -(2**63), "maximum": 2**63 - 1}, [0, -(2**62), 2**62], [2**63, -(2**63) - 1]),
        ({"minimum": 0, "maximum": 2**64 - 1}, [0, 2**62], [2**64, -1]),
        ({"minimum": -3.4028234663852886e38, "maximum": 3.4028234663852886e38}, [0, 5], [10**39]),
        ({"minimum": 1, "exclusiveMaximum": 10**400}, [1, 10**18], [0, 10**400]),
        ({"exclusiveMinimum": -1.7976931348623157e308}, [0, -5], []),
        ({"exclusiveMinimum": -1e300, "minimum": 2.5}, [3], [2, -1]),
    ],
)
def test_large_bounds_are_enforced(kind, bounds, right, wrong):
    """Also those of 64-bit integers and floats: values beyond a bound cannot be written."""
    text = json.dumps({"type": kind} | bounds)
    lenient = json.dumps({"type": kind} | bounds | LENIENT)

    for value in right:
        assert accepts("json_schema", text, str(value)), value
        assert accepts("json_schema", lenient, str(value)), value
    for value in wrong:
        assert not accepts("json_schema", text, str(value)), value


@pytest.mark.parametrize("bounds", [{"minimum": 2**64}, {"exclusiveMaximum": -(10**300)}])
def test_unreachable_bound_is_refused(bounds):
    """No answer would fit; a lenient schema allows any number."""
    assert refused({"type": "number"} | bounds, "range")
    assert accepts("json_schema", json.dumps({"type": "number"} | bounds | LENIENT), "3")


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        (
            "date",
            ["2024-02-29", "2000-02-29", "2023-02-28", "0004-02-29", "9999-12-31"],
            ["2021-02-29", "2100-02-29", "0100-02-29", "2024-02-30", "2024-04-31", "0000-01-01"],
        ),
        (
            "date-time",
            ["2024-02-29T23:59:59Z", "1999-01-31t00:00:00.125+14:00"],
            ["2023-02-29T00:00:00Z", "2024-01-01T12:00:60Z", "1998-12-31T23:59:60Z"],
        ),
        ("time", ["00:00:00Z", "23:59:59.5-01:30"], ["12:00:60Z", "23:59:60Z", "24:00:00Z"]),
        (
            "hostname",
            [
                "a",
                "ab",
                "a-b",
                "ab-c.x1",
                "a1b2--c",
                "x" * 63 + ".de",
                ".".join(["x" * 50] * 5)[:253],
            ],
            ["xn--X", "ab--c", "x" * 64, ".".join(["x" * 50] * 5), "-a", "a-", "a..b"],
        ),
        (
            "email",
            ["a.b+c@x.example", "x" * 64 + "@y.z"],
            ["x" * 65 + "@y.z", "a@-b.c", "a@" + "b" * 64 + ".c"],
        ),
    ],
)
def test_formats_allow_only_valid_values(name, right, wrong):
    """No dates that do not exist, no leap seconds, no names that are too long."""
    schema = {"type": "string", "format": name}
    for text in (json.dumps(schema), json.dumps(schema | {"pattern": "."})):
        assert [] == [value for value in right if not accepts("json_schema", text, f'"{value}"')]
        assert [] == [value for value in wrong if accepts("json_schema", text, f'"{value}"')]


@pytest.mark.parametrize(
    ("bounds", "right", "wrong"),
    [
        ({"maximum": 0.10026911992978531}, "0.100269119929785", "0.10026911992978532"),
        ({"minimum": -492319.52673090197}, "-492319.526730901", "-492319.526730902"),
        ({"exclusiveMinimum": 0.00023878882510103738}, "0.000239", "0.00023878882510103738"),
    ],
)
def test_bounds_of_many_digits_hold(bounds, right, wrong):
    """To the last digit of a double."""
    text = json.dumps({"type": "number"} | bounds)

    assert accepts("json_schema", text, right)
    assert not accepts("json_schema", text, wrong)


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (
            {
                "type": "object",
                "propertyNames": {"type": "string"},
                "additionalProperties": {"type": "integer"},
            },
            {"a": 1},
            {"a": "1"},
        ),
        ({"type": "array", "uniqueItems": False, "unevaluatedItems": True}, [1, 1], {}),
        ({"type": "object", "unevaluatedProperties": {}, "propertyNames": True}, {"a": 1}, []),
        ({"type": "null", "not": False, "dependentRequired": {}, "dependencies": {}}, None, 1),
    ],
)
def test_keywords_without_effect_are_accepted(schema, right, wrong):
    """Such as in zod's records and OpenAPI's defaults."""
    assert accepts("json_schema", json.dumps(schema), json.dumps(right))
    assert not accepts("json_schema", json.dumps(schema), json.dumps(wrong))


@pytest.mark.parametrize(
    "name", ["Größe", "List[int]", "Page<User>", "Response«User»", "a b", "x^{2}|"]
)
def test_references_need_no_uri_escapes(name):
    """Without URI escapes, as some schema generators write them."""
    for options in ({}, LENIENT):
        text = json.dumps(
            {"$ref": f"#/$defs/{name}", "$defs": {name: {"type": "integer"}}} | options
        )

        assert accepts("json_schema", text, "1")
        assert not accepts("json_schema", text, '"a"')


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", '{"$ref": "#/$defs/nested"}'),
        ("json_schema", '{"type": "nest"}'),
        ("json_schema", '{"type": "string", "format": "too long"}'),
        ("json_schema", '{"type": "object", "required": ["fuel"], "properties": {"fuel": false}}'),
        ("lark", 'start: nested "that exceeds"'),
        ("lark", 'start: "exceed" x\n%json'),
        ("regex", "(nested"),
    ],
)
def test_property_names_do_not_cause_a_complexity_error(kind, text):
    """Names that occur in messages about limits, too."""
    with pytest.raises(ConstraintError) as caught:
        compiled(kind, text)

    assert "too complex" not in caught.value.message
    assert "json_schema_too_complex" != caught.value.code


def union(**members):
    """A recursive union as pydantic writes it."""
    definitions = {
        name: {
            "type": "object",
            "properties": {
                "kind": kind,
                "next": {"anyOf": [{"$ref": "#/$defs/u"}, {"type": "null"}]},
            },
            "required": ["kind"],
            "additionalProperties": False,
        }
        for name, kind in members.items()
    }
    options = [{"$ref": f"#/$defs/{name}"} for name in members]
    return {"$ref": "#/$defs/u", "$defs": definitions | {"u": {"oneOf": options}}}


def test_a_union_may_refer_to_itself():
    """If a required property tells its members apart."""
    text = json.dumps(union(cat={"const": "cat"}, dog={"enum": ["dog", "puppy"]}))

    assert accepts("json_schema", text, '{"kind":"puppy","next":{"kind":"cat","next":null}}')
    assert accepts("lark", f"start: %json {text}", '{"kind":"cat"}')
    assert not accepts("json_schema", text, '{"kind":"cow"}')
    assert not accepts("json_schema", text, '{"kind":"puppy","next":{"kind":"cow"}}')


@pytest.mark.parametrize(
    "members",
    [
        {"cat": {"const": "cat"}, "dog": {"enum": ["dog", "cat"]}},
        {"cat": {"const": "cat"}, "dog": {"type": "string"}},
        {"one": {"const": 1}, "other": {"const": 1.0}},
    ],
)
def test_a_union_whose_members_may_be_the_same_is_refused(members):
    """oneOf requires that exactly one of them fits."""
    schema = union(**members)

    assert refused(schema, "oneOf|circular")
    for keyword in ("type", "required", "properties"):
        apart = union(cat={"const": "cat"}, dog={"const": "dog"})
        del apart["$defs"]["dog"][keyword]
        assert refused(apart, "oneOf|circular")
