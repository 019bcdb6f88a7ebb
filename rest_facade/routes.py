"""The handlers of all paths.

A completion goes requests → convert → backend → convert → sse.
"""

import importlib.metadata
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from rest_facade.backend import Backend, CompletionStream
from rest_facade.body import read_json
from rest_facade.config import FacadeSettings
from rest_facade.connection import while_connected
from rest_facade.convert import chat, completion, tokenizer
from rest_facade.convert.chat import ChatChunks
from rest_facade.convert.chunks import Chunks
from rest_facade.convert.completion import CompletionChunks
from rest_facade.convert.envelope import taken
from rest_facade.json_encoding import encode, encode_answer
from rest_facade.metrics import CONTENT_TYPE, Metrics
from rest_facade.openapi import (
    READ_ERRORS,
    RawRoute,
    checks_health,
    openapi_document,
    reads,
    takes_body,
)
from rest_facade.page import Page
from rest_facade.requests.chat import ChatCompletionRequest
from rest_facade.requests.completion import TextCompletionRequest
from rest_facade.requests.field import Body
from rest_facade.requests.tokenization import (
    DetokenizeRequest,
    TokenizeRequest,
    TokenizerInfoRequest,
)
from rest_facade.requests.validation import parse, rename_error_params
from rest_facade.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    DetokenizeResponse,
    HealthResponse,
    ModelList,
    ModelObject,
    TextCompletion,
    TextCompletionChunk,
    TokenizeResponse,
    TokenizerInfoResponse,
)
from rest_facade.stream import Event, EventStream
from rest_facade.usage import RequestUsage, usage_of
from trivium.field_errors import missing
from trivium.offload import INLINE_ANSWER_BYTES, offload
from trivium.wire import tracing
from trivium.wire.in_flight import InFlight

RequestBody = TypeVar("RequestBody", bound=Body)
RequestMessage = TypeVar("RequestMessage")
Result = TypeVar("Result")

_MODEL_IN_PATH = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
_MODEL_IN_QUERY = {"name": "model", "in": "query", "schema": {"type": "string"}}


class Routes:
    """The handlers, and what they share."""

    def __init__(
        self, settings: FacadeSettings, backend: Backend, in_flight: InFlight, metrics: Metrics
    ) -> None:
        self._settings = settings
        self._backend = backend
        self._in_flight = in_flight
        self._metrics = metrics
        self._healthy = HealthResponse(status="ok", version=importlib.metadata.version("trivium"))

    def router(self) -> APIRouter:
        """Declares the routes, with what the OpenAPI document says about them."""
        router = APIRouter(route_class=RawRoute)
        self._declare_completions(router)
        self._declare_models(router)
        router.add_api_route(
            "/health",
            self.ready,
            **checks_health("ready", "Whether a completion would be accepted", HealthResponse),
        )
        router.add_api_route(
            "/health/live",
            self.live,
            **checks_health("live", "Whether this process responds", HealthResponse),
        )
        settings = self._settings
        paths: dict[str, Callable[[Request], Awaitable[Response]]] = {}
        if settings.docs:
            paths |= {"/docs": Page("docs.html").respond, "/openapi.json": self.openapi}
        if settings.metrics and not settings.metrics_port:
            paths["/metrics"] = self.metrics
        if settings.chat_page:
            paths["/"] = Page("chat.html").respond
        for path, handler in paths.items():
            router.add_api_route(path, handler, include_in_schema=False)
        self._openapi = encode(openapi_document(router.routes))
        return router

    def _declare_completions(self, router: APIRouter) -> None:
        router.add_api_route(
            "/v1/chat/completions",
            self.chat_completions,
            methods=["POST"],
            **takes_body(
                "createChatCompletion",
                "Creates a chat completion, as JSON or as server-sent events",
                ChatCompletionRequest,
                ChatCompletion,
                ChatCompletionChunk,
            ),
        )
        router.add_api_route(
            "/v1/completions",
            self.completions,
            methods=["POST"],
            **takes_body(
                "createCompletion",
                "Creates completions of prompts, as JSON or as server-sent events",
                TextCompletionRequest,
                TextCompletion,
                TextCompletionChunk,
            ),
        )

    def _declare_models(self, router: APIRouter) -> None:
        router.add_api_route(
            "/v1/models", self.models, **reads("listModels", "All models", ModelList)
        )
        router.add_api_route(
            "/v1/models/{id:path}",
            self.model,
            **reads("getModel", "One model", ModelObject, parameters=[_MODEL_IN_PATH]),
        )
        router.add_api_route(
            "/tokenize",
            self.tokenize,
            methods=["POST"],
            **takes_body(
                "tokenize",
                "The token ids of a text or a conversation",
                TokenizeRequest,
                TokenizeResponse,
            ),
        )
        router.add_api_route(
            "/detokenize",
            self.detokenize,
            methods=["POST"],
            **takes_body("detokenize", "Text of token ids", DetokenizeRequest, DetokenizeResponse),
        )
        about = "Information about a model's tokenizer"
        router.add_api_route(
            "/tokenizer_info",
            self.tokenizer_info,
            **reads(
                "getTokenizerInfo",
                about,
                TokenizerInfoResponse,
                (400, *READ_ERRORS),
                parameters=[_MODEL_IN_QUERY],
            ),
        )
        router.add_api_route(
            "/tokenizer_info",
            self.tokenizer_info,
            methods=["POST"],
            **takes_body("askTokenizerInfo", about, TokenizerInfoRequest, TokenizerInfoResponse),
        )

    async def chat_completions(self, request: Request) -> Response:
        """A chat completion, whole or streamed."""
        started_at = time.perf_counter()
        body, message = await self._read(
            request, partial(_parse_and_convert, ChatCompletionRequest, chat.request)
        )
        usage = usage_of(request.scope)
        usage.set_model(body.model)
        with rename_error_params(body.client_names()):
            if body.stream:
                stream = self._backend.stream_chat(message)
                return await self._stream(request, stream, ChatChunks(body), started_at)
            response = await while_connected(request.receive, self._backend.complete_chat(message))
        return await _respond(usage, response, lambda: chat.answer(response, body))

    async def completions(self, request: Request) -> Response:
        """A plain completion, whole or streamed."""
        started_at = time.perf_counter()
        body, message = await self._read(
            request, partial(_parse_and_convert, TextCompletionRequest, completion.request)
        )
        usage = usage_of(request.scope)
        usage.set_model(body.model)
        with rename_error_params(body.client_names()):
            if body.stream:
                stream = self._backend.stream_text(message)
                return await self._stream(request, stream, CompletionChunks(body), started_at)
            response = await while_connected(request.receive, self._backend.complete_text(message))
        return await _respond(usage, response, lambda: completion.answer(response, body))

    async def _read(self, request: Request, convert: Callable[[dict[str, Any]], Result]) -> Result:
        """The result of `convert` on the body's JSON object."""
        settings = self._settings
        with tracing.span("receive"):
            return await read_json(
                request, settings.max_body_bytes, settings.body_read_seconds, convert
            )

    async def _stream(
        self,
        request: Request,
        stream: CompletionStream[Event],
        converter: Chunks[Any],
        started_at: float,
    ) -> Response:
        usage = usage_of(request.scope)

        def on_begin() -> None:
            usage.began, usage.taken = True, lambda: converter.taken

        def on_text() -> None:
            self._metrics.first_token_seconds.observe(time.perf_counter() - started_at)
            tracing.current().event("first_token")

        events = EventStream(
            stream, converter, self._settings.keep_alive_seconds, on_begin, on_text
        )
        await events.begin(request.receive)
        return events

    async def models(self, request: Request) -> Response:
        """All models."""
        return _json(tokenizer.model_list(await self._models(request)))

    async def model(self, request: Request) -> Response:
        """One model; an empty id is 404."""
        if not request.path_params["id"]:
            raise HTTPException(404)
        return _json(tokenizer.model_object(await self._model(request, request.path_params["id"])))

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a text or a conversation."""
        body = await self._read(request, partial(parse, TokenizeRequest))
        return await while_connected(request.receive, self._tokenize(request, body))

    async def _tokenize(self, request: Request, body: TokenizeRequest) -> Response:
        model = await self._model(request, body.model)
        response: tokenizer.EncodeResponse | tokenizer.RenderResponse
        if body.messages is None:
            response = await self._backend.tokenize(tokenizer.tokenize_request(body, model.id))
        else:
            response = await self._backend.render_chat(tokenizer.render_request(body, model.id))
        answer = partial(tokenizer.tokenize_answer, response, body, model.context_length)
        return await offload(response.ByteSize(), lambda: _json(answer()), INLINE_ANSWER_BYTES)

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        body = await self._read(request, partial(parse, DetokenizeRequest))
        return await while_connected(request.receive, self._detokenize(request, body))

    async def _detokenize(self, request: Request, body: DetokenizeRequest) -> Response:
        model = await self._model(request, body.model)
        message = tokenizer.detokenize_request(model.id, body.tokens)
        with rename_error_params({"token_ids": "tokens"}):
            response = await self._backend.detokenize(message)
        return _json(tokenizer.detokenize_answer(response))

    async def tokenizer_info(self, request: Request) -> Response:
        """Information about a model's tokenizer; GET takes the model as a query parameter."""
        if request.method == "POST":
            name = (await self._read(request, partial(parse, TokenizerInfoRequest))).model
        else:
            name = request.query_params.get("model")
        model = await self._model(request, name)
        response = await self._backend.tokenizer_info(tokenizer.info_request(model.id))
        return _json(tokenizer.info(response))

    async def _models(self, request: Request) -> list[tokenizer.Model]:
        """All models that the request's key may use."""
        models = (await self._backend.models()).models
        return [model for model in models if usage_of(request.scope).may_use(model.id)]

    async def _model(self, request: Request, name: str | None) -> tokenizer.Model:
        """The model of that name; without a name, the only model."""
        if name is not None:
            usage_of(request.scope).set_model(name)
            with rename_error_params({"id": "model"}):
                return await self._backend.model(name)
        models = await self._models(request)
        if len(models) != 1:
            raise missing("model")
        return models[0]

    async def ready(self, request: Request) -> Response:
        """Whether a completion would be accepted now."""
        self._in_flight.check_ready()
        await self._backend.check(self._settings.health_timeout_seconds)
        return _json(self._healthy)

    async def live(self, request: Request) -> Response:
        """Whether this process responds, regardless of other stages."""
        return _json(self._healthy)

    async def metrics(self, request: Request) -> Response:
        """All metrics in Prometheus' text format."""
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        """The OpenAPI document."""
        return Response(self._openapi, media_type="application/json")


def _parse_and_convert(
    kind: type[RequestBody], convert: Callable[[RequestBody], RequestMessage], raw: dict[str, Any]
) -> tuple[RequestBody, RequestMessage]:
    """The request in a body's JSON, and its message for the next stage."""
    body = parse(kind, raw)
    return body, convert(body)


async def _respond(
    usage: RequestUsage, response: chat.Response | completion.Response, answer: Callable[[], Any]
) -> Response:
    """The HTTP response to a request that was not streamed; `answer` is its body."""
    usage.began, usage.taken = True, partial(taken, response.usage)
    # In JSON each choice of a plain completion repeats the tokens of its prompt.
    size = response.ByteSize() * len(response.choices)
    body = await offload(size, lambda: encode_answer(answer()), INLINE_ANSWER_BYTES)
    return Response(body, media_type="application/json")


def _json(body: Any) -> Response:
    return Response(encode(body), media_type="application/json")
