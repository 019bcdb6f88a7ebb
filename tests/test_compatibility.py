"""docs/compatibility.md has every field, and each row names a test that exists."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from openai.types.completion_create_params import (
    CompletionCreateParamsBase as TextCompletionCreateParamsBase,
)

from rest_facade.requests.chat import ChatCompletionRequest
from rest_facade.requests.message import MessageParam
from tests.compatibility import (
    CHAT_ANSWER,
    CHAT_REQUEST,
    COMPLETION_ANSWER,
    COMPLETION_REQUEST,
    MODELS,
    TABLES,
    Row,
)
from tests.openai_shapes import SCHEMAS

TESTS = Path(__file__).parent
ROWS = [row for rows in TABLES.values() for row in rows]


def fields(rows: tuple[Row, ...]) -> str:
    """All fields in these rows, joined by commas."""
    return ", ".join(row.field for row in rows) + ","


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.field)
def test_every_row_names_an_existing_test(row: Row) -> None:
    """The test named in a row exists and has a docstring."""
    file, _, name = row.shown.partition("::")
    functions = {
        node.name: ast.get_docstring(node)
        for node in ast.parse((TESTS / file).read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }

    assert functions.get(name), f"{row.shown} is not a test with a docstring"


def test_every_request_field_has_a_row() -> None:
    """Fields that we know, and fields that OpenAI's client can send, are all in the table."""
    named = {row.field for row in CHAT_REQUEST}
    ours = ChatCompletionRequest.model_fields.keys() - {"stream_options"}
    openais = CompletionCreateParamsBase.__annotations__.keys() - {"stream_options"}
    messages = {f"messages[].{name}" for name in MessageParam.model_fields} - {
        "messages[].reasoning"  # in reasoning_content's row
    }

    assert set() == (ours | openais | messages) - named


def test_every_completion_request_field_has_a_row() -> None:
    """The same for plain completions."""
    openais = TextCompletionCreateParamsBase.__annotations__.keys()

    assert [] == [name for name in openais if f"{name}," not in fields(COMPLETION_REQUEST)]


def extensions(schema: Any, name: str = "") -> Iterator[str]:
    """The names of all keys marked as ours."""
    if isinstance(schema, list):
        for inner in schema:
            yield from extensions(inner, name)
    if not isinstance(schema, dict):
        return
    if "x-trivium" in schema:
        yield name
    for key, inner in schema.get("properties", {}).items():
        yield from extensions(inner, key)
    if "items" in schema:
        yield from extensions(schema["items"], f"{name}[]")
    yield from extensions(schema.get("anyOf", []), name)


def test_every_response_extension_has_a_row() -> None:
    """What the schemas add to OpenAI's answers is in the tables, as an extension."""
    rows = {
        row.field.rpartition(".")[2]: row for row in (*CHAT_ANSWER, *COMPLETION_ANSWER, *MODELS)
    }
    marked = {name for schema in SCHEMAS.values() for name in extensions(schema)}

    assert {"gpu_seconds", "reasoning_content", "context_length"} < marked
    assert set() == marked - rows.keys()
    assert all("extension" in rows[name].ours for name in marked if not name.endswith("[]"))
