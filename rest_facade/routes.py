"""What each path of completions, models and health answers.

A completion goes schema → convert → backend → convert → sse.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rest_facade.backend import Backend, CompletionStream
from rest_facade.body import read_json
from rest_facade.completion import CompletionRequest
from rest_facade.config import FacadeSettings
from rest_facade.connection import while_connected
from rest_facade.convert import chat, model, text
from rest_facade.field import Body
from rest_facade.json_text import JSONAnswer, encode
from rest_facade.metrics import CONTENT_TYPE, Metrics
from rest_facade.openapi import openapi_document
from rest_facade.schema import ChatRequest
from rest_facade.sse import ChatWriter, TextWriter
from rest_facade.stream import ChunkWriter, Event, EventStream
from rest_facade.traffic import Traffic
from rest_facade.validation import blaming, parse

Wanted = TypeVar("Wanted", bound=Body)
Asked = TypeVar("Asked")

_DOCS_PAGE = Path(__file__).with_name("docs.html")
# The page cannot load anything from elsewhere, whatever becomes of it.
_DOCS_POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
)


class Routes:
    """The handlers, and what they all need."""

    def __init__(
        self, settings: FacadeSettings, backend: Backend, traffic: Traffic, metrics: Metrics
    ) -> None:
        self._settings = settings
        self._backend = backend
        self._traffic = traffic
        self._metrics = metrics
        self._openapi = encode(openapi_document())
        self._docs = _DOCS_PAGE.read_bytes()

    def table(self) -> list[Route]:
        """Which path goes where."""
        return [
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{id:path}", self.model, methods=["GET"]),
            Route("/health", self.ready, methods=["GET"]),
            Route("/health/live", self.live, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/docs", self.docs, methods=["GET"]),
            Route("/openapi.json", self.openapi, methods=["GET"]),
        ]

    async def chat_completions(self, request: Request) -> Response:
        """A chat completion, whole or streamed."""
        started_at = time.perf_counter()
        wanted, asked = await self._body(request, ChatRequest, chat.request)
        if wanted.stream:
            stream = self._backend.stream_chat(asked)
            with blaming(wanted.old_names()):
                return await self._streamed(request, stream, ChatWriter(wanted), started_at)
        with blaming(wanted.old_names()):
            response = await while_connected(request.receive, self._backend.complete_chat(asked))
        return JSONAnswer(encode(chat.answer(response, wanted)))

    async def completions(self, request: Request) -> Response:
        """A plain completion, whole or streamed."""
        started_at = time.perf_counter()
        wanted, asked = await self._body(request, CompletionRequest, text.request)
        if wanted.stream:
            stream = self._backend.stream_text(asked)
            with blaming(wanted.old_names()):
                return await self._streamed(request, stream, TextWriter(wanted), started_at)
        with blaming(wanted.old_names()):
            response = await while_connected(request.receive, self._backend.complete_text(asked))
        return JSONAnswer(encode(text.answer(response, wanted)))

    async def _body(
        self, request: Request, kind: type[Wanted], convert: Callable[[Wanted], Asked]
    ) -> tuple[Wanted, Asked]:
        """The request in the body, and as the next stage takes it."""

        def checked(raw: dict[str, Any]) -> tuple[Wanted, Asked]:
            wanted = parse(kind, raw)
            return wanted, convert(wanted)

        settings = self._settings
        return await read_json(
            request, settings.max_body_bytes, settings.body_read_seconds, checked
        )

    async def _streamed(
        self,
        request: Request,
        stream: CompletionStream[Event],
        writer: ChunkWriter[Event],
        started_at: float,
    ) -> Response:
        try:
            # Awaited before any answer, so that early failures have their own HTTP status.
            first = await while_connected(request.receive, stream.read())
        except BaseException:
            stream.close()
            raise
        first_token = self._metrics.first_token_seconds
        return EventStream(
            first,
            stream,
            writer,
            self._settings.keep_alive_seconds,
            on_text=lambda: first_token.observe(time.perf_counter() - started_at),
        )

    async def models(self, request: Request) -> Response:
        """All models."""
        return JSONAnswer(encode(model.model_list(await self._backend.models())))

    async def model(self, request: Request) -> Response:
        """One model. The path's empty end is none's name."""
        if not request.path_params["id"]:
            raise HTTPException(404)
        with blaming({"id": "model"}):
            found = await self._backend.model(request.path_params["id"])
        return JSONAnswer(encode(model.model_object(found)))

    async def ready(self, request: Request) -> Response:
        """Whether a completion would be taken on now."""
        self._traffic.check_ready()
        await self._backend.check(self._settings.health_timeout_seconds)
        return JSONAnswer(encode({"status": "ok"}))

    async def live(self, request: Request) -> Response:
        """Whether this process answers at all; its peers do not matter."""
        return JSONAnswer(encode({"status": "ok"}))

    async def metrics(self, request: Request) -> Response:
        """Counters, in Prometheus' text format."""
        self._metrics.running.set(self._traffic.running)
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def docs(self, request: Request) -> Response:
        """A page that shows /openapi.json."""
        headers = {"content-security-policy": _DOCS_POLICY}
        return Response(self._docs, media_type="text/html", headers=headers)

    async def openapi(self, request: Request) -> Response:
        """The API's description."""
        return JSONAnswer(self._openapi)
