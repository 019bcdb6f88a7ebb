"""The documentation that the facade serves about itself."""

import re
from typing import Any

import httpx

from rest_facade import responses
from rest_facade.openapi import openapi_document
from rest_facade.requests.chat import ChatRequest


def _references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(_references, value.values()))
    if isinstance(value, list):
        return set().union(*map(_references, value))
    return set()


def test_references_resolve() -> None:
    """Every reference in the OpenAPI document leads to a schema in it."""
    document = openapi_document()
    names = {ref.removeprefix("#/components/schemas/") for ref in _references(document)}

    assert names
    assert names <= document["components"]["schemas"].keys()


def test_request_and_answers_are_described() -> None:
    """The document has every field of the request, with its limits, and every answer."""
    schemas = openapi_document()["components"]["schemas"]
    request = schemas["ChatRequest"]

    assert request["properties"].keys() == ChatRequest.model_fields.keys()
    assert request["required"] == ["model", "messages"]
    assert {"minimum": 0, "maximum": 2, "type": "number"} in request["properties"]["temperature"][
        "anyOf"
    ]
    assert schemas["Usage"]["properties"].keys() == responses.Usage.__annotations__.keys()


async def test_served_document(client: httpx.AsyncClient) -> None:
    """/openapi.json is that document, and its paths exist."""
    document = (await client.get("/openapi.json")).json()

    assert document == openapi_document()
    for path in document["paths"]:
        missing = await client.options(path.replace("{id}", "scripted"))
        assert missing.status_code == 405


async def test_docs_page_is_self_contained(client: httpx.AsyncClient) -> None:
    """The page loads nothing from elsewhere, and its policy would not let it."""
    page = await client.get("/docs")

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert re.findall(r"(?:src|href)=\"(?!/|data:)", page.text) == []
    assert "//" not in page.text.replace("http://", "")
