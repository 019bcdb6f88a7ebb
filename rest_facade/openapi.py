"""The API's OpenAPI document, made from the request models and the types of the answers."""

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from rest_facade import responses
from rest_facade.requests.chat import ChatRequest
from rest_facade.requests.completion import CompletionRequest
from rest_facade.requests.tokenization import (
    DetokenizeRequest,
    TokenizeRequest,
    TokenizerInfoRequest,
)
from trivium.wire.errors import ERRORS

_REQUESTS = (
    ChatRequest,
    CompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
    TokenizerInfoRequest,
)
_ANSWERS = (
    responses.ChatCompletion,
    responses.ChatCompletionChunk,
    responses.TextCompletion,
    responses.TextCompletionChunk,
    responses.TokenizeAnswer,
    responses.DetokenizeAnswer,
    responses.TokenizerInfo,
    responses.ModelObject,
    responses.ModelList,
    responses.ErrorBody,
    responses.Health,
)
# Or none: whether a key is asked for is the operator's choice.
_KEY: list[dict[str, list[str]]] = [{}, {"key": []}]
_BODY_ERRORS = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
_READ_ERRORS = (401, 404, 500, 503, 504)


def openapi_document() -> dict[str, Any]:
    """An OpenAPI 3.1 document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Trivium",
            "version": "1",
            "description": "Completions as the OpenAI API has them.",
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
    adapters = [(kind.__name__, mode, TypeAdapter(kind)) for kind in (*_REQUESTS, *_ANSWERS)]
    _, document = TypeAdapter.json_schemas(adapters, ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = document["$defs"]
    return schemas


def _paths() -> dict[str, Any]:
    model = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "/v1/chat/completions": {
            "post": _sent(
                "createChatCompletion",
                "Completes a conversation, whole or as server-sent events",
                "ChatRequest",
                _completion("ChatCompletion", "ChatCompletionChunk"),
            )
        },
        "/v1/completions": {
            "post": _sent(
                "createCompletion",
                "Completes plain prompts, whole or as server-sent events",
                "CompletionRequest",
                _completion("TextCompletion", "TextCompletionChunk"),
            )
        },
        "/v1/models": {"get": _read("listModels", "All models", "ModelList", True)},
        "/v1/models/{id}": {
            "parameters": [model],
            "get": _read("getModel", "One model", "ModelObject", True),
        },
        **_token_paths(),
        "/health": {"get": _read("ready", "Whether a completion would be taken on", "Health")},
        "/health/live": {"get": _read("live", "Whether this process answers", "Health")},
    }


def _token_paths() -> dict[str, Any]:
    query = {"name": "model", "in": "query", "schema": {"type": "string"}}
    about = "What kind of tokenizer a model has"
    return {
        "/tokenize": {
            "post": _sent(
                "tokenize",
                "The tokens of a text or a conversation",
                "TokenizeRequest",
                _json("TokenizeAnswer"),
            )
        },
        "/detokenize": {
            "post": _sent(
                "detokenize", "The text of tokens", "DetokenizeRequest", _json("DetokenizeAnswer")
            )
        },
        "/tokenizer_info": {
            "get": {
                **_read("getTokenizerInfo", about, "TokenizerInfo", True, (400,)),
                "parameters": [query],
            },
            "post": _sent(
                "askTokenizerInfo", about, "TokenizerInfoRequest", _json("TokenizerInfo")
            ),
        },
    }


def _completion(whole: str, chunk: str) -> dict[str, Any]:
    # Without a schema: what 3.1 would have it describe is all events together.
    events = {"x-event-schema": _ref(chunk)}
    return {**_json(whole), "text/event-stream": events}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(name)}}


def _sent(operation: str, summary: str, body: str, content: dict[str, Any]) -> dict[str, Any]:
    """An operation that takes a body."""
    words = "The answer."
    if "text/event-stream" in content:
        words = "The answer; with `stream` one chunk per event, then `data: [DONE]`."
    return {
        "operationId": operation,
        "summary": summary,
        "security": _KEY,
        "requestBody": {"required": True, "content": _json(body)},
        "responses": {
            "200": {"description": words, "content": content},
            **_errors(*_BODY_ERRORS),
        },
    }


def _read(
    operation: str,
    summary: str,
    answered: str,
    needs_key: bool = False,
    further: tuple[int, ...] = (),
) -> dict[str, Any]:
    """An operation that takes none."""
    errors = (*further, *_READ_ERRORS) if needs_key else (503,)
    return {
        "operationId": operation,
        "summary": summary,
        "security": _KEY if needs_key else [],
        "responses": {
            "200": {"description": summary + ".", "content": _json(answered)},
            **_errors(*errors),
        },
    }


def _errors(*statuses: int) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref("ErrorBody")}}
    return {str(status): {"description": _codes(status), "content": content} for status in statuses}


def _codes(status: int) -> str:
    return ", ".join(f"`{code}`" for code, kind in ERRORS.items() if kind.http == status)


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
