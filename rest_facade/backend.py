"""The next stage, as the facade calls it. Every failure leaves here as a ServiceError.

Knows nothing of HTTP or JSON.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import grpc

from rest_facade.convert import chat, model, text, token
from trivium.wire.errors import ServiceError, from_rpc_error
from trivium.wire.telemetry import outgoing_metadata

CHAT_SERVICE = "trivium.chat.v1.ChatService"

_READ_SECONDS = 10  # what is known by heart
_TOKENIZE_SECONDS = 60  # the largest body takes a few

Event = TypeVar("Event")


class Backend:
    """Calls on one channel. `timeout` in seconds is the longest that a completion may take."""

    def __init__(self, channel: grpc.aio.Channel, timeout: float | None = None) -> None:
        # The stubs are generated without types.
        self._chat = chat.ChatServiceStub(channel)  # type: ignore[no-untyped-call]
        self._text = text.CompletionServiceStub(channel)  # type: ignore[no-untyped-call]
        self._models = model.ModelServiceStub(channel)  # type: ignore[no-untyped-call]
        self._tokenizer = token.TokenizerServiceStub(channel)  # type: ignore[no-untyped-call]
        self._health = model.HealthStub(channel)
        self._timeout = timeout
        self._running: set[Any] = set()
        self._stopped = False

    async def complete_chat(self, request: chat.Request) -> chat.Response:
        """The whole answer; the call is cancelled when the caller is."""
        response: chat.Response = await self._completed(self._chat.CreateChatCompletion, request)
        return response

    async def complete_text(self, request: text.Request) -> text.Response:
        """The same for a plain completion."""
        response: text.Response = await self._completed(self._text.CreateCompletion, request)
        return response

    def stream_chat(self, request: chat.Request) -> "CompletionStream[chat.ChatEvent]":
        """An answer as it is made. The caller closes it, whatever happens."""
        return self._stream(self._chat.StreamChatCompletion, request, chat.event)

    def stream_text(self, request: text.Request) -> "CompletionStream[text.TextEvent]":
        """The same for a plain completion."""
        return self._stream(self._text.StreamCompletion, request, text.event)

    async def models(self) -> Any:
        """All models, as protobuf."""
        return await self._read(self._models.ListModels, model.models_request())

    async def model(self, name: str) -> Any:
        """One model, as protobuf."""
        return (await self._read(self._models.GetModel, model.model_request(name))).model

    async def render_chat(self, request: Any) -> Any:
        """The tokens of a conversation, as protobuf."""
        return await self._read(self._tokenizer.RenderChat, request, _TOKENIZE_SECONDS)

    async def tokenize(self, request: Any) -> Any:
        """The tokens of a text, as protobuf."""
        return await self._read(self._tokenizer.Tokenize, request, _TOKENIZE_SECONDS)

    async def detokenize(self, request: Any) -> Any:
        """The text of tokens, as protobuf."""
        return await self._read(self._tokenizer.Detokenize, request, _TOKENIZE_SECONDS)

    async def tokenizer_info(self, request: Any) -> Any:
        """What kind of tokenizer a model has, as protobuf."""
        return await self._read(self._tokenizer.GetTokenizerInfo, request)

    async def check(self, seconds: float) -> None:
        """Returns if the next stage can answer; raises ServiceError otherwise."""
        request = model.health_request(CHAT_SERVICE)
        try:
            response = await self._health.Check(request, timeout=seconds)
        except grpc.aio.AioRpcError:
            message = "The model server cannot be reached."
            raise ServiceError("backend_unavailable", message) from None
        if not model.is_serving(response):
            raise ServiceError("model_loading", "The model server is not ready.")

    async def _read(self, method: Any, request: Any, seconds: float = _READ_SECONDS) -> Any:
        with self.translated():
            return await method(request, timeout=seconds, metadata=outgoing_metadata())

    async def _completed(self, method: Any, request: Any) -> Any:
        call = self._start(method, request)
        try:
            with self.translated():
                return await call
        finally:
            self.end(call)

    def _stream(
        self, method: Any, request: Any, to_event: Callable[[Any], Event]
    ) -> "CompletionStream[Event]":
        return CompletionStream(self, self._start(method, request), to_event)

    def _start(self, method: Any, request: Any) -> Any:
        call = method(request, timeout=self._timeout, metadata=outgoing_metadata())
        self._running.add(call)
        return call

    def cancel_all(self) -> None:
        """Ends every running completion: the time to drain is over."""
        self._stopped = True
        for call in tuple(self._running):
            call.cancel()

    def end(self, call: Any) -> None:
        """Lets go of `call`, and cancels it if it is not done."""
        self._running.discard(call)
        call.cancel()

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Whatever gRPC raises inside becomes a ServiceError."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            fault = from_rpc_error(error)
            if fault.code == "client_closed_request":  # it was not we who cancelled
                message = "The model server broke off."
                fault = ServiceError("backend_unavailable", message)
            raise fault from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._stopped and task is not None and not task.cancelling():
                raise ServiceError("draining", "The server is shutting down.") from None
            raise


class CompletionStream(Generic[Event]):
    """The events of one streamed answer."""

    def __init__(self, backend: Backend, call: Any, to_event: Callable[[Any], Event]) -> None:
        self._backend = backend
        self._call = call
        self._to_event = to_event

    async def read(self) -> Event | None:
        """The next event, or None at the end; raises ServiceError."""
        with self._backend.translated():
            response = await self._call.read()
        return None if response is grpc.aio.EOF else self._to_event(response)

    def close(self) -> None:
        """Cancels what is not done."""
        self._backend.end(self._call)
