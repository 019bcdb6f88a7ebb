"""The next stage, as the facade calls it. Every failure leaves here as a ServiceError.

Knows nothing of HTTP or JSON.
"""

import asyncio
import contextlib
import math
from collections.abc import Iterator
from typing import Any, Generic, Self, TypeVar, cast

import grpc

from rest_facade.convert import chat, completion, tokenizer
from trivium.wire.channel import GAP_SECONDS, open_channel, serving
from trivium.wire.errors import ServiceError, from_rpc_error
from trivium.wire.telemetry import outgoing_metadata

CHAT_SERVICE = "trivium.chat.v1.ChatService"
WHOLE_SERVER = ""  # in the health protocol

_READ_SECONDS = 10  # metadata lookups
_TOKENIZE_SECONDS = 60  # the largest body takes a few

Event = TypeVar("Event")
Request = TypeVar("Request")
Response = TypeVar("Response")


class Backend:
    """The tokenizers at `target`. An async context manager.

    `timeout` in seconds is the longest that a completion may take.
    """

    def __init__(self, target: str, timeout: float | None = None) -> None:
        # Completions go to tokenizers that have a generator, all else to any that runs.
        self._with_generator = open_channel(target, CHAT_SERVICE)
        self._any_tokenizer = open_channel(target, WHOLE_SERVER)
        self._chats = (
            chat.ChatServiceStub(self._with_generator),
            chat.ChatServiceStub(self._any_tokenizer),
        )
        self._texts = (
            completion.CompletionServiceStub(self._with_generator),
            completion.CompletionServiceStub(self._any_tokenizer),
        )
        self._models = tokenizer.ModelServiceStub(self._any_tokenizer)
        self._tokenizer = tokenizer.TokenizerServiceStub(self._any_tokenizer)
        self._timeout = timeout
        self._running: set[grpc.aio.Call] = set()
        self._stopped = False
        self._clock = asyncio.get_running_loop().time
        self._can_complete = asyncio.Event()
        self._lost_at = -math.inf

    async def __aenter__(self) -> Self:
        self._following = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._following.cancel()
        await asyncio.gather(self._following, return_exceptions=True)
        await self._with_generator.close()
        await self._any_tokenizer.close()

    def _is_stuck(self) -> bool:
        """Whether no tokenizer has a generator: then any of them says why."""
        failed = grpc.ChannelConnectivity.TRANSIENT_FAILURE
        return self._with_generator.get_state(try_to_connect=True) is failed

    async def complete_chat(self, request: chat.Request) -> chat.Response:
        """The whole answer; the call is cancelled when the caller is."""
        return await self._completed(self._chats[self._is_stuck()].CreateChatCompletion, request)

    async def complete_text(self, request: completion.Request) -> completion.Response:
        """The same for a plain completion."""
        return await self._completed(self._texts[self._is_stuck()].CreateCompletion, request)

    def stream_chat(self, request: chat.Request) -> "CompletionStream[chat.StreamResponse]":
        """An answer as it is made. The caller closes it, whatever happens."""
        method = self._chats[self._is_stuck()].StreamChatCompletion
        return self._stream(method, request)

    def stream_text(
        self, request: completion.Request
    ) -> "CompletionStream[completion.StreamResponse]":
        """The same for a plain completion."""
        method = self._texts[self._is_stuck()].StreamCompletion
        return self._stream(method, request)

    async def models(self) -> tokenizer.Models:
        """All models, as protobuf."""
        return await self._read(self._models.ListModels, tokenizer.models_request())

    async def model(self, name: str) -> tokenizer.Model:
        """One model, as protobuf."""
        return (await self._read(self._models.GetModel, tokenizer.model_request(name))).model

    async def render_chat(self, request: tokenizer.RenderRequest) -> tokenizer.RenderResponse:
        """The tokens of a conversation, as protobuf."""
        return await self._read(self._tokenizer.RenderChat, request, _TOKENIZE_SECONDS)

    async def tokenize(self, request: tokenizer.EncodeRequest) -> tokenizer.EncodeResponse:
        """The tokens of a text, as protobuf."""
        return await self._read(self._tokenizer.Tokenize, request, _TOKENIZE_SECONDS)

    async def detokenize(self, request: tokenizer.DecodeRequest) -> tokenizer.DecodeResponse:
        """The text of tokens, as protobuf."""
        return await self._read(self._tokenizer.Detokenize, request, _TOKENIZE_SECONDS)

    async def tokenizer_info(self, request: tokenizer.InfoRequest) -> tokenizer.InfoResponse:
        """What kind of tokenizer a model has, as protobuf."""
        return await self._read(self._tokenizer.GetTokenizerInfo, request)

    async def check(self, seconds: float) -> None:
        """Returns if some tokenizer can complete; raises ServiceError that says why none can."""
        if self._clock() - self._lost_at < GAP_SECONDS:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds / 2):
                await self._can_complete.wait()
                return
        try:
            await self._models.ListModels(tokenizer.models_request(), timeout=seconds / 2)
        except grpc.aio.AioRpcError as error:
            service_error = from_rpc_error(error)
            if service_error.code == "deadline_exceeded":
                message = "The model server cannot be reached."
                service_error = ServiceError("backend_unavailable", message)
            raise service_error from None
        raise ServiceError("model_loading", "The model server is not ready.")

    async def _follow(self) -> None:
        async with contextlib.aclosing(serving(self._with_generator)) as states:
            async for can_complete in states:
                if can_complete:
                    self._can_complete.set()
                elif self._can_complete.is_set():
                    self._can_complete.clear()
                    self._lost_at = self._clock()

    async def _read(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        seconds: float = _READ_SECONDS,
    ) -> Response:
        with self.errors_translated():
            return await method(request, timeout=seconds, metadata=outgoing_metadata())

    async def _completed(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Request, Response], request: Request
    ) -> Response:
        call = method(request, timeout=self._timeout, metadata=outgoing_metadata())
        self._running.add(call)
        try:
            with self.errors_translated():
                return await call
        finally:
            self.end(call)

    def _stream(
        self, method: grpc.aio.UnaryStreamMultiCallable[Request, Response], request: Request
    ) -> "CompletionStream[Response]":
        call = method(request, timeout=self._timeout, metadata=outgoing_metadata())
        self._running.add(call)
        return CompletionStream(self, call)

    def cancel_all(self) -> None:
        """Ends every running completion: the time to drain is over."""
        self._stopped = True
        for call in tuple(self._running):
            call.cancel()

    def end(self, call: grpc.aio.Call) -> None:
        """Forgets `call`, and cancels it if it is still running."""
        self._running.discard(call)
        call.cancel()

    @contextlib.contextmanager
    def errors_translated(self) -> Iterator[None]:
        """Whatever gRPC raises inside becomes a ServiceError."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            service_error = from_rpc_error(error)
            if service_error.code == "client_closed_request":  # it was not we who cancelled
                message = "The model server broke off."
                service_error = ServiceError("backend_unavailable", message)
            raise service_error from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._stopped and task is not None and not task.cancelling():
                raise ServiceError("draining", "The server is shutting down.") from None
            raise


class CompletionStream(Generic[Event]):
    """The events of one streamed answer."""

    def __init__(self, backend: Backend, call: grpc.aio.UnaryStreamCall[Any, Event]) -> None:
        self._backend = backend
        self._call = call

    async def read(self) -> Event | None:
        """The next event, or None at the end; raises ServiceError."""
        with self._backend.errors_translated():
            event = await self._call.read()
        # The stub's types do not tell an event from EOF.
        return None if event is grpc.aio.EOF else cast("Event", event)

    def close(self) -> None:
        """Cancels the call if it is still running."""
        self._backend.end(self._call)
