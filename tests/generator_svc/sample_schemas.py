"""Schemas that real programs send, each with values that fit it and values that do not.

pydantic's are made by pydantic. The others are written as zod 4's `z.toJSONSchema` and as servers
of the Model Context Protocol that are made from OpenAPI write them.
"""

import datetime
import decimal
import enum
import ipaddress
import json
import pathlib
import uuid
from typing import Annotated, Any, Literal

from pydantic import AnyUrl, Base64Bytes, BaseModel, Field, Json, RootModel, SecretStr, TypeAdapter

Sample = tuple[str, dict[str, Any], list[Any], list[Any]]


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(9, ge=0, multiple_of=3)


class Dog(BaseModel):
    kind: Literal["dog"]
    friends: "list[Cat | Dog]" = []


class Many(BaseModel):
    """Of what pydantic knows, all that JSON Schema has a keyword for."""

    tags: set[str]
    codes: frozenset[int] = frozenset()
    price: decimal.Decimal
    cents: Annotated[decimal.Decimal, Field(max_digits=5, decimal_places=2)] | None = None
    file: pathlib.Path
    raw: bytes
    encoded: Base64Bytes | None = None
    secret: SecretStr
    url: AnyUrl
    id: uuid.UUID
    day: datetime.date
    at: datetime.datetime
    lasts: datetime.timedelta
    address: ipaddress.IPv4Address
    network: ipaddress.IPv4Network
    colour: Colour
    counts: dict[str, int]
    by_name: dict[Annotated[str, Field(pattern=r"^[a-z]\w*$")], float] = {}
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    pair: tuple[int, str]
    nested: Json[list[int]] | None = None
    anything: Any = None


MANY = {
    "tags": ["a", "b"],
    "codes": [1],
    "price": "12.50",
    "cents": 1.25,
    "file": "/etc/hosts",
    "raw": "bytes",
    "encoded": "YWJj",
    "secret": "s",
    "url": "https://example.com/x",
    "id": "12345678-1234-4234-8234-123456789abc",
    "day": "2024-02-29",
    "at": "2024-02-29T12:00:00Z",
    "lasts": "P1D",
    "address": "10.0.0.1",
    "network": "10.0.0.0/8",
    "colour": "red",
    "counts": {"x": 1},
    "by_name": {"a": 1.5},
    "pet": {"kind": "dog", "friends": [{"kind": "cat", "lives": 3}]},
    "pair": [1, "b"],
    "nested": "[1]",
    "anything": {"x": [None]},
}


def zod(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """What zod makes of an object."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


EMAIL = (
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+"
    r"[A-Za-z]{2,}$"
)
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "not": {"enum": ["root"]}},
                "inner": {"type": "array", "items": {"$ref": "#/$defs/node"}, "uniqueItems": True},
            },
            "required": ["name"],
            "additionalProperties": False,
        }
    },
}

SAMPLES: list[Sample] = [
    ("pydantic", Many.model_json_schema(), [MANY], [MANY | {"counts": {"x": "1"}}, {"tags": []}]),
    (
        "pydantic answers",
        Many.model_json_schema(mode="serialization"),
        [MANY | {"price": "1", "cents": "1.25", "nested": [1]}],
        [MANY | {"colour": "green"}],
    ),
    ("a set", TypeAdapter(set[int]).json_schema(), [[], [1, 2]], [["a"], {}]),
    ("a recursive model", Dog.model_json_schema(), [MANY["pet"]], [{"kind": "cat"}]),
    (
        "a root model",
        RootModel[dict[Colour, list[bytes]]].model_json_schema(),
        [{"red": ["x"]}],
        [{"red": [1]}],
    ),
    (
        "zod",
        zod(
            {
                "scores": {
                    "type": "object",
                    "propertyNames": {"type": "string"},
                    "additionalProperties": {"type": "number"},
                },
                "sizes": {
                    "type": "object",
                    "propertyNames": {"type": "string", "enum": ["s", "m"]},
                    "additionalProperties": {"type": "integer", "minimum": 0},
                    "required": ["s", "m"],
                },
                "mail": {"type": "string", "format": "email", "pattern": EMAIL},
                "code": {"type": "string", "format": "cuid", "pattern": "^[cC][^\\s-]{8,}$"},
                "blob": {"type": "string", "format": "base64", "contentEncoding": "base64"},
                "jwt": {"type": "string", "format": "jwt"},
                "never": {"not": {}},
                "tuple": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "number"}]},
                "either": {"oneOf": [{"type": "string"}, {"type": "string", "const": "a"}]},
            },
            "scores",
            "mail",
        ),
        [
            {"scores": {"a": 1.5}, "mail": "a.b@example.com"},
            {"scores": {}, "sizes": {"s": 1, "m": 2}, "mail": "x@y.zz", "either": "b"},
            {
                "scores": {},
                "mail": "x@y.zz",
                "code": "c12345678",
                "blob": "YQ==",
                "tuple": ["a", 1],
            },
        ],
        [
            {"scores": {"a": "1"}, "mail": "a@example.com"},
            {"scores": {}, "mail": "nobody"},
            {"scores": {}, "mail": "x@y.zz", "sizes": {"s": -1, "m": 2}},
            {"scores": {}, "mail": "x@y.zz", "code": "c 1234567890"},
            {"scores": {}, "mail": "x@y.zz", "more": 1},
        ],
    ),
    (
        "from OpenAPI",
        {
            "type": "object",
            "properties": {
                "id": {"type": "integer", "format": "int64", "minimum": 1},
                "password": {"type": "string", "format": "password", "minLength": 3},
                "upload": {"type": "string", "format": "binary"},
                "next": {"type": "string", "format": "uri-reference", "nullable": True},
                "ratio": {
                    "type": "number",
                    "format": "double",
                    "exclusiveMinimum": 0,
                    "maximum": 1,
                },
                "labels": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
                "owner": {"$ref": "#/components/schemas/Owner"},
                "source": {
                    "oneOf": [
                        {"properties": {"url": {"type": "string"}}, "required": ["url"]},
                        {"properties": {"path": {"type": "string"}}, "required": ["path"]},
                    ],
                    "type": "object",
                    "discriminator": {"propertyName": "url"},
                },
            },
            "required": ["id"],
            "if": {"required": ["upload"]},
            "then": {"required": ["labels"]},
            "dependentRequired": {"password": ["id"]},
            "minProperties": 1,
        },
        [
            {"id": 5},
            {"id": 1, "password": "abc", "upload": "x", "labels": ["a"], "owner": {"any": 1}},
            {"id": 1, "next": "/a?b", "ratio": 0.5, "source": {"path": "/x"}},
        ],
        [{"id": 0}, {"id": 1, "password": "ab"}, {"id": 1, "ratio": 2}, {"id": 1, "source": []}],
    ),
    ("a tree", TREE, [{"name": "a", "inner": [{"name": "b"}]}], [{"inner": []}, {"name": 1}]),
    (
        "what nothing fits",
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a", "gone"],
            "additionalProperties": False,
        },
        [],
        [{"a": "1"}, {}, []],
    ),
    (
        "names by pattern",
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "patternProperties": {"^x": {"type": "integer"}, "y$": {"type": ["integer", "null"]}},
            "additionalProperties": False,
        },
        [{"a": 1, "xy": 2}, {"y": None}],
        [{"a": "1"}, {"x": "1"}],
    ),
    (
        "far numbers",
        {
            "type": "object",
            "properties": {
                "n": {"type": "number", "minimum": -1e308, "maximum": 1e308, "multipleOf": 1e-20},
                "m": {"type": "integer", "multipleOf": 99_991, "minimum": 0},
                "k": {"type": "integer", "multipleOf": 5},
            },
        },
        [{"n": 5, "m": 99_991, "k": 10}],
        [{"n": "5"}, {"m": -1}, {"k": 7}],
    ),
]


def written(value: Any) -> str:
    """A value as a model writes it."""
    return json.dumps(value, ensure_ascii=False)
