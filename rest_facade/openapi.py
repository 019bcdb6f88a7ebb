"""The API's OpenAPI document, made from the request models and the types of the answers."""

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from rest_facade import answer
from rest_facade.schema import ChatRequest
from trivium.wire.errors import ERRORS

_ANSWERS = (
    answer.ChatCompletion,
    answer.ChatCompletionChunk,
    answer.ModelObject,
    answer.ModelList,
    answer.ErrorBody,
    answer.Health,
)
_COMPLETION_ERRORS = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
_READ_ERRORS = (401, 404, 500, 503)


def openapi_document() -> dict[str, Any]:
    """An OpenAPI 3.1 document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Trivium",
            "version": "1",
            "description": "Chat completions as the OpenAI API has them.",
        },
        "paths": _paths(),
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Asked for when the server has a key file.",
                }
            },
        },
    }


def _schemas() -> dict[str, Any]:
    mode: JsonSchemaMode = "validation"
    adapters = [(kind.__name__, mode, TypeAdapter(kind)) for kind in (ChatRequest, *_ANSWERS)]
    _, document = TypeAdapter.json_schemas(adapters, ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = document["$defs"]
    return schemas


def _paths() -> dict[str, Any]:
    events = {
        "description": "With `stream`: one ChatCompletionChunk per event, then `data: [DONE]`.",
        "schema": {"type": "string"},
        "x-event-schema": _ref("ChatCompletionChunk"),
    }
    completion = {"schema": _ref("ChatCompletion")}
    model_id = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "/v1/chat/completions": {
            "post": {
                "operationId": "createChatCompletion",
                "summary": "Completes a conversation, whole or as server-sent events",
                "security": [{"key": []}],
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": _ref("ChatRequest")}},
                },
                "responses": {
                    "200": {
                        "description": "The answer.",
                        "content": {"application/json": completion, "text/event-stream": events},
                    },
                    **_errors(*_COMPLETION_ERRORS),
                },
            }
        },
        "/v1/models": {"get": _read("listModels", "All models", "ModelList", True)},
        "/v1/models/{id}": {
            "parameters": [model_id],
            "get": _read("getModel", "One model", "ModelObject", True),
        },
        "/health": {"get": _read("ready", "Whether a completion would be taken on", "Health")},
        "/health/live": {"get": _read("live", "Whether this process answers", "Health")},
    }


def _read(operation: str, summary: str, answered: str, needs_key: bool = False) -> dict[str, Any]:
    return {
        "operationId": operation,
        "summary": summary,
        "security": [{"key": []}] if needs_key else [],
        "responses": {
            "200": {
                "description": summary + ".",
                "content": {"application/json": {"schema": _ref(answered)}},
            },
            **_errors(*(_READ_ERRORS if needs_key else (503,))),
        },
    }


def _errors(*statuses: int) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref("ErrorBody")}}
    return {str(status): {"description": _codes(status), "content": content} for status in statuses}


def _codes(status: int) -> str:
    return ", ".join(f"`{code}`" for code, kind in ERRORS.items() if kind.http == status)


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
