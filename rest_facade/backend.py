"""Calls the next stage, the tokenizers; every failure is raised as a ServiceError.

Knows nothing about HTTP or JSON.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, Generic, Self, TypeVar, cast

import grpc

from rest_facade.convert import chat, completion, tokenizer
from trivium.keys.own_key import OwnKey, own_metadata
from trivium.wire import telemetry
from trivium.wire.errors import ServiceError, from_rpc_error
from trivium.wire.replicas.replica import Replica
from trivium.wire.replicas.replica_set import GAP_SECONDS, ReplicaSet
from trivium.wire.tls.channel import ChannelTls

log = logging.getLogger(__name__)

CHAT_SERVICE = "trivium.chat.v1.ChatService"

_READ_SECONDS = 10  # metadata lookups
_UNSAMPLED_TRACEPARENT = f"00-{1:032x}-{1:016x}-00"  # for calls that should not start a trace
_HEALTH_CHECK_KEY_NAME = "check"  # the key name that readiness checks use
_TOKENIZE_SECONDS = 60  # the largest body takes a few seconds

Event = TypeVar("Event")
Request = TypeVar("Request")
Response = TypeVar("Response")
Call = TypeVar("Call", bound=grpc.aio.Call)

# Selects a method of a stub of a replica.
Unary = Callable[[Replica], grpc.aio.UnaryUnaryMultiCallable[Request, Response]]
Streaming = Callable[[Replica], grpc.aio.UnaryStreamMultiCallable[Any, Event]]


class Backend:
    """The tokenizers at `target`. An async context manager.

    `timeout` is the maximum time for a completion, in seconds. `key` authenticates this stage; if
    calls name the caller's key, `forwards_key_names`, it has to be a stage key. Without `tls`,
    calls are in plain text.
    """

    def __init__(
        self,
        target: str,
        timeout: float | None = None,
        key: OwnKey | None = None,
        tls: ChannelTls | None = None,
        forwards_key_names: bool = False,
    ) -> None:
        # Tokenizers serve while they have a generator; if none does, any of them says why.
        refusals = ["invalid_api_key"]  # processes do not all reload changed keys at once
        self.replicas = ReplicaSet(
            target, CHAT_SERVICE, any_reachable=True, refusals=refusals, tls=tls
        )
        self._timeout = timeout
        self._key = key
        self._forwards_key_names = forwards_key_names
        self._is_key_accepted = False
        self._key_refusal = ""  # already logged
        self._running: set[grpc.aio.Call] = set()
        self._stopped = False
        self._clock = asyncio.get_running_loop().time
        self._can_complete = asyncio.Event()
        self._lost_at = -math.inf

    async def __aenter__(self) -> Self:
        self._watcher = asyncio.create_task(self._watch_replicas())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watcher.cancel()
        await asyncio.gather(self._watcher, return_exceptions=True)
        await self.replicas.close()

    async def complete_chat(self, request: chat.Request) -> chat.Response:
        """The complete response; cancelling the caller cancels the call."""
        return await self._complete(
            lambda replica: replica.stub(chat.ChatServiceStub).CreateChatCompletion, request
        )

    async def complete_text(self, request: completion.Request) -> completion.Response:
        """The same for a plain completion."""
        return await self._complete(
            lambda replica: replica.stub(completion.CompletionServiceStub).CreateCompletion,
            request,
        )

    def stream_chat(self, request: chat.Request) -> "CompletionStream[chat.StreamResponse]":
        """A streamed response. The caller must close it."""
        return CompletionStream(
            self,
            lambda replica: replica.stub(chat.ChatServiceStub).StreamChatCompletion,
            request,
        )

    def stream_text(
        self, request: completion.Request
    ) -> "CompletionStream[completion.StreamResponse]":
        """The same for a plain completion."""
        return CompletionStream(
            self,
            lambda replica: replica.stub(completion.CompletionServiceStub).StreamCompletion,
            request,
        )

    async def models(self) -> tokenizer.Models:
        """All models, as protobuf."""
        return await self._read(
            lambda replica: replica.stub(tokenizer.ModelServiceStub).ListModels,
            tokenizer.models_request(),
        )

    async def model(self, name: str) -> tokenizer.Model:
        """One model, as protobuf."""
        response = await self._read(
            lambda replica: replica.stub(tokenizer.ModelServiceStub).GetModel,
            tokenizer.model_request(name),
        )
        return response.model

    async def render_chat(self, request: tokenizer.RenderRequest) -> tokenizer.RenderResponse:
        """The token ids of a conversation, as protobuf."""
        return await self._read(
            lambda replica: replica.stub(tokenizer.TokenizerServiceStub).RenderChat,
            request,
            _TOKENIZE_SECONDS,
        )

    async def tokenize(self, request: tokenizer.EncodeRequest) -> tokenizer.EncodeResponse:
        """The token ids of a text, as protobuf."""
        return await self._read(
            lambda replica: replica.stub(tokenizer.TokenizerServiceStub).Tokenize,
            request,
            _TOKENIZE_SECONDS,
        )

    async def detokenize(self, request: tokenizer.DecodeRequest) -> tokenizer.DecodeResponse:
        """The text of token ids, as protobuf."""
        return await self._read(
            lambda replica: replica.stub(tokenizer.TokenizerServiceStub).Detokenize,
            request,
            _TOKENIZE_SECONDS,
        )

    async def tokenizer_info(self, request: tokenizer.InfoRequest) -> tokenizer.InfoResponse:
        """Information about a model's tokenizer, as protobuf."""
        return await self._read(
            lambda replica: replica.stub(tokenizer.TokenizerServiceStub).GetTokenizerInfo, request
        )

    async def check(self, seconds: float) -> None:
        """Returns if any tokenizer can complete; otherwise raises ServiceError with the reason."""
        if self._clock() - self._lost_at < GAP_SECONDS:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds / 2):
                await self._can_complete.wait()
                if not self._is_key_accepted:  # health checks do not show whether it is
                    telemetry.traceparent.set(_UNSAMPLED_TRACEPARENT)
                    if self._forwards_key_names:  # as requests do; only a stage key may
                        telemetry.key_name.set(_HEALTH_CHECK_KEY_NAME)
                    await self.models()
                return
        try:
            async with asyncio.timeout(seconds / 2):
                await self.models()
        except TimeoutError:
            message = "The model server cannot be reached."
            raise ServiceError("backend_unavailable", message) from None
        raise ServiceError("model_loading", "The model server is not ready.")

    def deadline(self) -> float | None:
        """The deadline of a completion that begins now, on the event loop's clock."""
        return None if self._timeout is None else self._clock() + self._timeout

    def begin(
        self, replica: Replica, method: Callable[..., Call], request: Any, deadline: float | None
    ) -> Call:
        """Starts a call with this deadline; the caller must `end` it."""
        if self._stopped:
            raise _draining()
        seconds = None if deadline is None else max(deadline - self._clock(), 0.0)
        call = replica.track(method(request, timeout=seconds, metadata=self._metadata()))
        self._running.add(call)
        return call

    def cancel_all(self) -> None:
        """Cancels every running completion, at the end of the drain period."""
        self._stopped = True
        for call in tuple(self._running):
            call.cancel()

    def end(self, call: grpc.aio.Call) -> None:
        """Forgets `call`, and cancels it if it is still running."""
        self._running.discard(call)
        call.cancel()

    @contextlib.contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Turns gRPC errors raised inside into ServiceErrors."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            service_error = from_rpc_error(error)
            if service_error.code == "client_closed_request":  # not cancelled by us
                message = "The connection to the model server was lost."
                service_error = ServiceError("backend_unavailable", message)
            elif service_error.code == "invalid_api_key":  # our key, not the caller's
                self._is_key_accepted = False
                if self._key_refusal != service_error.message:
                    self._key_refusal = service_error.message
                    log.error("the tokenizer refuses this stage's key: %s", self._key_refusal)
                message = "The model server refuses this server's key."
                service_error = ServiceError("backend_unavailable", message)
            raise service_error from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._stopped and task is not None and not task.cancelling():
                raise _draining() from None
            raise

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return telemetry.outgoing_metadata() + own_metadata(self._key)

    async def _watch_replicas(self) -> None:
        async with contextlib.aclosing(self.replicas.changes()) as states:
            async for can_complete in states:
                if can_complete:
                    self._can_complete.set()
                elif self._can_complete.is_set():
                    self._can_complete.clear()
                    self._lost_at = self._clock()

    async def _read(
        self, method: Unary[Request, Response], request: Request, seconds: float = _READ_SECONDS
    ) -> Response:
        async def attempt(replica: Replica) -> Response:
            call = method(replica)(request, timeout=seconds, metadata=self._metadata())
            with replica.answering():
                response = await replica.track(call)
            self._is_key_accepted, self._key_refusal = True, ""
            return response

        with self.translate_errors():
            return await self.replicas.call(attempt)

    async def _complete(self, method: Unary[Request, Response], request: Request) -> Response:
        deadline = self.deadline()

        async def attempt(replica: Replica) -> Response:
            call = self.begin(replica, method(replica), request, deadline)
            try:
                with replica.answering():
                    return await call
            finally:
                self.end(call)

        with self.translate_errors():
            return await self.replicas.call(attempt)


def _draining() -> ServiceError:
    return ServiceError("draining", "The server is shutting down.")


class CompletionStream(Generic[Event]):
    """The events of one streamed response."""

    def __init__(self, backend: Backend, method: Streaming[Event], request: Any) -> None:
        self._backend = backend
        self._method = method
        self._request = request
        self._deadline = backend.deadline()
        self._call: grpc.aio.UnaryStreamCall[Any, Event] | None = None
        self._replica: Replica | None = None

    async def read(self) -> Event | None:
        """The next event, or None at the end; raises ServiceError."""
        with self._backend.translate_errors():
            if self._call is None or self._replica is None:
                event = await self._backend.replicas.call(self._first)
            else:
                try:
                    event = await self._call.read()
                except grpc.aio.AioRpcError as error:
                    self._replica.log_foreign(error)
                    raise
        # The stub's types do not distinguish events from EOF.
        return None if event is grpc.aio.EOF else cast("Event", event)

    def close(self) -> None:
        """Cancels the call if it is still running."""
        if self._call is not None:
            self._backend.end(self._call)

    async def _first(self, replica: Replica) -> Any:
        self.close()
        method = self._method(replica)
        self._call = self._backend.begin(replica, method, self._request, self._deadline)
        self._replica = replica
        with replica.answering():
            return await self._call.read()
