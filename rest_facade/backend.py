"""The next stage, as the facade calls it. Every failure leaves here as a ServiceError.

Knows nothing of HTTP or JSON.
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
_NOT_SAMPLED = f"00-{1:032x}-{1:016x}-00"  # of what no trace should begin with
_CHECK = "check"  # the name of the key in whose name readiness is asked for
_TOKENIZE_SECONDS = 60  # the largest body takes a few

Event = TypeVar("Event")
Request = TypeVar("Request")
Response = TypeVar("Response")
Call = TypeVar("Call", bound=grpc.aio.Call)

# How a replica is asked one thing, by the names of a stub and of its method.
Unary = Callable[[Replica], grpc.aio.UnaryUnaryMultiCallable[Request, Response]]
Streaming = Callable[[Replica], grpc.aio.UnaryStreamMultiCallable[Any, Event]]


class Backend:
    """The tokenizers at `target`. An async context manager.

    `timeout` in seconds is the longest that a completion may take. `key` is shown to tokenizers; if
    requests say whose they are, `names_keys`, it has to be a stage's. Without `tls` calls are in
    plain text.
    """

    def __init__(
        self,
        target: str,
        timeout: float | None = None,
        key: OwnKey | None = None,
        tls: ChannelTls | None = None,
        names_keys: bool = False,
    ) -> None:
        # Those that have a generator serve; while none does, any of them says why.
        refusals = ["invalid_api_key"]  # of our key, which reaches one process sooner than another
        self.replicas = ReplicaSet(
            target, CHAT_SERVICE, any_reachable=True, refusals=refusals, tls=tls
        )
        self._timeout = timeout
        self._key = key
        self._names_keys = names_keys
        self._is_key_accepted = False
        self._key_refusal = ""  # that is logged already
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
        await self.replicas.close()

    async def complete_chat(self, request: chat.Request) -> chat.Response:
        """The whole answer; the call is cancelled when the caller is."""
        return await self._completed(
            lambda replica: replica.stub(chat.ChatServiceStub).CreateChatCompletion, request
        )

    async def complete_text(self, request: completion.Request) -> completion.Response:
        """The same for a plain completion."""
        return await self._completed(
            lambda replica: replica.stub(completion.CompletionServiceStub).CreateCompletion,
            request,
        )

    def stream_chat(self, request: chat.Request) -> "CompletionStream[chat.StreamResponse]":
        """An answer as it is made. The caller closes it, whatever happens."""
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
        """The tokens of a conversation, as protobuf."""
        return await self._read(
            lambda replica: replica.stub(tokenizer.TokenizerServiceStub).RenderChat,
            request,
            _TOKENIZE_SECONDS,
        )

    async def tokenize(self, request: tokenizer.EncodeRequest) -> tokenizer.EncodeResponse:
        """The tokens of a text, as protobuf."""
        return await self._read(
            lambda replica: replica.stub(tokenizer.TokenizerServiceStub).Tokenize,
            request,
            _TOKENIZE_SECONDS,
        )

    async def detokenize(self, request: tokenizer.DecodeRequest) -> tokenizer.DecodeResponse:
        """The text of tokens, as protobuf."""
        return await self._read(
            lambda replica: replica.stub(tokenizer.TokenizerServiceStub).Detokenize,
            request,
            _TOKENIZE_SECONDS,
        )

    async def tokenizer_info(self, request: tokenizer.InfoRequest) -> tokenizer.InfoResponse:
        """What kind of tokenizer a model has, as protobuf."""
        return await self._read(
            lambda replica: replica.stub(tokenizer.TokenizerServiceStub).GetTokenizerInfo, request
        )

    async def check(self, seconds: float) -> None:
        """Returns if some tokenizer can complete; raises ServiceError that says why none can."""
        if self._clock() - self._lost_at < GAP_SECONDS:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds / 2):
                await self._can_complete.wait()
                if not self._is_key_accepted:  # a tokenizer's health does not tell
                    telemetry.traceparent.set(_NOT_SAMPLED)
                    if self._names_keys:  # as requests do, which only a stage's key may
                        telemetry.key_name.set(_CHECK)
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
        """Until when a completion that begins now has to be done, on the loop's clock."""
        return None if self._timeout is None else self._clock() + self._timeout

    def begin(
        self, replica: Replica, method: Callable[..., Call], request: Any, deadline: float | None
    ) -> Call:
        """A call that may last until `deadline`; whoever begins it `end`s it."""
        if self._stopped:
            raise _draining()
        seconds = None if deadline is None else max(deadline - self._clock(), 0.0)
        call = replica.track(method(request, timeout=seconds, metadata=self._metadata()))
        self._running.add(call)
        return call

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
                message = "The connection to the model server was lost."
                service_error = ServiceError("backend_unavailable", message)
            elif service_error.code == "invalid_api_key":  # ours, not the caller's
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

    async def _follow(self) -> None:
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

        with self.errors_translated():
            return await self.replicas.ask(attempt)

    async def _completed(self, method: Unary[Request, Response], request: Request) -> Response:
        deadline = self.deadline()

        async def attempt(replica: Replica) -> Response:
            call = self.begin(replica, method(replica), request, deadline)
            try:
                with replica.answering():
                    return await call
            finally:
                self.end(call)

        with self.errors_translated():
            return await self.replicas.ask(attempt)


def _draining() -> ServiceError:
    return ServiceError("draining", "The server is shutting down.")


class CompletionStream(Generic[Event]):
    """The events of one streamed answer."""

    def __init__(self, backend: Backend, method: Streaming[Event], request: Any) -> None:
        self._backend = backend
        self._method = method
        self._request = request
        self._deadline = backend.deadline()
        self._call: grpc.aio.UnaryStreamCall[Any, Event] | None = None
        self._replica: Replica | None = None

    async def read(self) -> Event | None:
        """The next event, or None at the end; raises ServiceError."""
        with self._backend.errors_translated():
            if self._call is None or self._replica is None:
                event = await self._backend.replicas.ask(self._first)
            else:
                try:
                    event = await self._call.read()
                except grpc.aio.AioRpcError as error:
                    self._replica.log_foreign(error)
                    raise
        # The stub's types do not tell an event from EOF.
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
