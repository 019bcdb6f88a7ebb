"""The API's OpenAPI document: how routes are declared, with what FastAPI cannot know about them.

FastAPI never parses a body here, so the request models are listed by hand; so are the chunks of
streams, which OpenAPI 3.1 cannot describe.
"""

import copy
import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from rest_facade.requests.chat import ChatCompletionRequest
from rest_facade.requests.completion import TextCompletionRequest
from rest_facade.requests.field import Body
from rest_facade.requests.tokenization import (
    DetokenizeRequest,
    TokenizeRequest,
    TokenizerInfoRequest,
)
from rest_facade.responses import ChatCompletionChunk, ErrorResponse, TextCompletionChunk
from trivium.wire.errors import ERRORS

_SCHEMAS = (
    ChatCompletionRequest,
    TextCompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
    TokenizerInfoRequest,
    ChatCompletionChunk,
    TextCompletionChunk,
    ErrorResponse,
)
# Optional: whether a key is required is the operator's choice.
_KEY: list[dict[str, list[str]]] = [{}, {"key": []}]
_BODY_ERRORS = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
READ_ERRORS = (401, 404, 500, 503, 504)


class RawRoute(APIRoute):
    """A route that FastAPI documents, but whose handler parses the request itself, strictly.

    FastAPI's own parsing accepts NaN, turns "1" into 1, and has its own error format.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **declared: Any) -> None:
        super().__init__(path, endpoint, **declared)
        self.description = ""  # the handler's docstring is for readers of the code
        if self.methods and "GET" in self.methods:
            self.methods.add("HEAD")

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        return self.endpoint


def takes_body(
    operation_id: str, summary: str, body: type[Body], answer: type, chunk: type | None = None
) -> dict[str, Any]:
    """Declares a route that takes `body`, and may stream `chunk`s."""
    answered: dict[str, Any] = {"description": "The response.", "model": answer}
    if chunk is not None:
        answered["description"] = (
            "The response; with `stream` one chunk per event, then `data: [DONE]`."
        )
        # Not as a schema, which in 3.1 would have to describe all events together.
        answered["content"] = {"text/event-stream": {"x-event-schema": _ref(chunk)}}
    content = {"application/json": {"schema": _ref(body)}}
    return {
        "operation_id": operation_id,
        "summary": summary,
        "responses": {200: answered, **_errors(_BODY_ERRORS)},
        "openapi_extra": {
            "security": _KEY,
            "requestBody": {"required": True, "content": content},
        },
    }


def reads(
    operation_id: str,
    summary: str,
    answer: type,
    errors: Sequence[int] = READ_ERRORS,
    **extra: Any,
) -> dict[str, Any]:
    """Declares a route of the API that takes no body."""
    return {
        "operation_id": operation_id,
        "summary": summary,
        "responses": {200: {"description": f"{summary}.", "model": answer}, **_errors(errors)},
        "openapi_extra": {"security": _KEY} | extra,
    }


def checks_health(operation_id: str, summary: str, answer: type) -> dict[str, Any]:
    """Declares a route that needs no key."""
    return reads(operation_id, summary, answer, (503,), security=[])


def _errors(statuses: Sequence[int]) -> dict[int, dict[str, Any]]:
    # Not as a "model", from which FastAPI would create a field for each route and status.
    content = {"application/json": {"schema": _ref(ErrorResponse)}}
    return {status: {"description": _codes(status), "content": content} for status in statuses}


def _codes(status: int) -> str:
    return ", ".join(f"`{code}`" for code, kind in ERRORS.items() if kind.http == status)


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def openapi_document(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the declared routes."""
    document = get_openapi(
        title="Trivium",
        version="1",
        description="An OpenAI-compatible API.",
        routes=[_without_head(route) for route in routes],
    )
    components = document["components"]
    components["schemas"] = dict(sorted((components["schemas"] | _schemas()).items()))
    components["securitySchemes"] = {
        "key": {
            "type": "http",
            "scheme": "bearer",
            "description": "Required if the server has a key file.",
        }
    }
    return document


def _without_head(route: BaseRoute) -> BaseRoute:
    """Leaves out HEAD, which FastAPI would document as another operation of the same name."""
    shown = copy.copy(route)
    if isinstance(shown, RawRoute):
        shown.methods = (shown.methods or set()) - {"HEAD"}
    return shown


@functools.cache
def _schemas() -> dict[str, Any]:
    mode: JsonSchemaMode = "validation"
    adapters = [(kind.__name__, mode, TypeAdapter(kind)) for kind in _SCHEMAS]
    _, document = TypeAdapter.json_schemas(adapters, ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = document["$defs"]
    return schemas
