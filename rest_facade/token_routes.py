"""What /tokenize, /detokenize and /tokenizer_info answer: vLLM's shapes, at vLLM's paths."""

from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rest_facade.backend import Backend
from rest_facade.body import read_json
from rest_facade.config import FacadeSettings
from rest_facade.connection import while_connected
from rest_facade.convert import token
from rest_facade.field import Body, missing
from rest_facade.json_text import JSONAnswer, encode
from rest_facade.token_schema import DetokenizeRequest, TokenizeRequest, TokenizerInfoRequest
from rest_facade.validation import blaming, parse

Wanted = TypeVar("Wanted", bound=Body)


class TokenRoutes:
    """The handlers, and what they all need."""

    def __init__(self, settings: FacadeSettings, backend: Backend) -> None:
        self._settings = settings
        self._backend = backend

    def table(self) -> list[Route]:
        """Which path goes where."""
        return [
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.info, methods=["GET", "POST"]),
        ]

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a text or a conversation."""
        wanted = await self._body(request, TokenizeRequest)
        return await while_connected(request.receive, self._tokenize(wanted))

    async def _tokenize(self, wanted: TokenizeRequest) -> Response:
        model = await self._model(wanted.model)
        if wanted.messages is None:
            response = await self._backend.tokenize(token.tokenize_request(wanted, model.id))
        else:
            response = await self._backend.render_chat(token.render_request(wanted, model.id))
        return JSONAnswer(encode(token.tokenize_answer(response.token_ids, model.context_length)))

    async def detokenize(self, request: Request) -> Response:
        """The text of tokens."""
        wanted = await self._body(request, DetokenizeRequest)
        return await while_connected(request.receive, self._detokenize(wanted))

    async def _detokenize(self, wanted: DetokenizeRequest) -> Response:
        model = await self._model(wanted.model)
        asked = token.detokenize_request(model.id, wanted.tokens)
        with blaming({"token_ids": "tokens"}):
            response = await self._backend.detokenize(asked)
        return JSONAnswer(encode(token.detokenize_answer(response)))

    async def info(self, request: Request) -> Response:
        """What kind of tokenizer a model has; GET takes the model as a query parameter."""
        if request.method == "POST":
            name = (await self._body(request, TokenizerInfoRequest)).model
        else:
            name = request.query_params.get("model")
        model = await self._model(name)
        response = await self._backend.tokenizer_info(token.info_request(model.id))
        return JSONAnswer(encode(token.info(response)))

    async def _body(self, request: Request, kind: type[Wanted]) -> Wanted:
        settings = self._settings
        return await read_json(
            request,
            settings.max_body_bytes,
            settings.body_read_seconds,
            lambda raw: parse(kind, raw),
        )

    async def _model(self, name: str | None) -> Any:
        """The model of that name, or the only one there is."""
        if name is not None:
            with blaming({"id": "model"}):
                return await self._backend.model(name)
        models = (await self._backend.models()).models
        if len(models) != 1:
            raise missing("model")
        return models[0]
