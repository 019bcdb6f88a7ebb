"""Schemas that are exact: what fits them not at all cannot be written, or they are refused."""

import json

import pytest

from generator_svc.sequence import ConstraintError
from tests.generator_svc.text_tokens import accepts, compiled

LENIENT = {"x-guidance": {"lenient": True}}


def refused(schema, says):
    """Whether an exact schema is refused with those words, by itself and in a grammar."""
    for kind, text in (("json_schema", "{}"), ("lark", "start: call\ncall: %json {}")):
        with pytest.raises(ConstraintError, match=says) as caught:
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
    """Names that a schema leaves open may be repeated; an exact count of them is refused."""
    schema = {"type": "object"} | schema

    assert refused(schema, "minProperties")
    assert accepts("json_schema", json.dumps(schema | LENIENT), few)
    assert not accepts("json_schema", json.dumps(schema | LENIENT), "{}")


@pytest.mark.parametrize("least", [1, 2, 3])
def test_properties_are_counted_where_their_names_differ(least):
    """Those that are required, and one other."""
    names = ["a", "b"][: least - 1]
    schema = {"type": "object", "required": names, "minProperties": least}
    text = json.dumps(schema)

    assert accepts("json_schema", text, json.dumps(dict.fromkeys(names, 1) | {"c": 1}))
    assert not accepts("json_schema", text, json.dumps(dict.fromkeys(names, 1)))
