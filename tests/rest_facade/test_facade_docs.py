"""The facade's own API documentation."""

import re
from typing import Any

import httpx
import pytest

from rest_facade import responses
from rest_facade.requests.chat import ChatCompletionRequest


def _references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(_references, value.values()))
    if isinstance(value, list):
        return set().union(*map(_references, value))
    return set()


@pytest.fixture
async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    """The document at /openapi.json."""
    served: dict[str, Any] = (await client.get("/openapi.json")).json()
    return served


def test_references_resolve(document: dict[str, Any]) -> None:
    """Every reference in the OpenAPI document resolves to a schema in it."""
    names = {ref.removeprefix("#/components/schemas/") for ref in _references(document)}

    assert names
    assert names <= document["components"]["schemas"].keys()


def test_request_and_answers_are_described(document: dict[str, Any]) -> None:
    """The document has every field of the request, with its limits, and every answer."""
    schemas = document["components"]["schemas"]
    request = schemas["ChatCompletionRequest"]

    assert request["properties"].keys() == ChatCompletionRequest.model_fields.keys()
    assert request["required"] == ["model", "messages"]
    assert {"minimum": 0, "maximum": 2, "type": "number"} in request["properties"]["temperature"][
        "anyOf"
    ]
    assert (
        schemas["CompletionUsage"]["properties"].keys()
        == responses.CompletionUsage.__annotations__.keys()
    )


async def test_paths_of_the_document_exist(
    client: httpx.AsyncClient, document: dict[str, Any]
) -> None:
    """Each path in the document accepts its own methods, and HEAD with GET, but no others."""
    assert "/v1/chat/completions" in document["paths"]
    for path, operations in document["paths"].items():
        methods = {name.upper() for name in operations}
        refused = await client.options(path.replace("{id}", "scripted"))

        assert refused.status_code == 405
        assert set(refused.headers["allow"].split(", ")) == methods | (
            {"HEAD"} if "GET" in methods else set()
        )


async def test_head_is_answered_like_get(client: httpx.AsyncClient) -> None:
    """HEAD is answered like GET, without the body."""
    for path in ("/", "/v1/models", "/v1/models/scripted", "/health", "/metrics", "/docs"):
        got, head = await client.get(path), await client.head(path)

        assert (got.status_code, head.status_code, head.content) == (200, 200, b"")


async def test_docs_page_is_self_contained(client: httpx.AsyncClient) -> None:
    """The page loads nothing from other hosts, and its policy forbids it."""
    page = await client.get("/docs")

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "unsafe" not in page.headers["content-security-policy"]
    assert re.findall(r"(?:src|href)=\"(?!/|data:)", page.text) == []
    assert "//" not in page.text.replace("http://", "")
