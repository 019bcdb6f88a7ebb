"""The next stage, as the facade calls it. Every failure leaves here as a ServiceError.

Knows nothing of HTTP or JSON.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import grpc

from rest_facade import convert
from trivium.wire.errors import ServiceError, from_rpc_error
from trivium.wire.telemetry import outgoing_metadata

CHAT_SERVICE = "trivium.chat.v1.ChatService"


class Backend:
    """Calls on one channel. `timeout` in seconds is the longest that a completion may take."""

    def __init__(self, channel: grpc.aio.Channel, timeout: float | None = None) -> None:
        # The stubs are generated without types.
        self._chat = convert.ChatServiceStub(channel)  # type: ignore[no-untyped-call]
        self._models = convert.ModelServiceStub(channel)  # type: ignore[no-untyped-call]
        self._health = convert.HealthStub(channel)
        self._timeout = timeout
        self._running: set[Any] = set()
        self._stopped = False

    async def complete(self, request: convert.CompletionRequest) -> convert.CompletionResponse:
        """The whole answer; the call is cancelled when the caller is."""
        call = self._chat.CreateChatCompletion(
            request, timeout=self._timeout, metadata=outgoing_metadata()
        )
        self._running.add(call)
        try:
            with self.translated():
                response: convert.CompletionResponse = await call
                return response
        finally:
            self.end(call)

    def stream(self, request: convert.CompletionRequest) -> "CompletionStream":
        """An answer as it is made. The caller closes it, whatever happens."""
        call = self._chat.StreamChatCompletion(
            request, timeout=self._timeout, metadata=outgoing_metadata()
        )
        self._running.add(call)
        return CompletionStream(self, call)

    async def models(self) -> Any:
        """All models, as protobuf."""
        with self.translated():
            return await self._models.ListModels(
                convert.models_request(), timeout=10, metadata=outgoing_metadata()
            )

    async def model(self, model: str) -> Any:
        """One model, as protobuf."""
        with self.translated():
            response = await self._models.GetModel(
                convert.model_request(model), timeout=10, metadata=outgoing_metadata()
            )
            return response.model

    async def check(self, seconds: float) -> None:
        """Returns if the next stage can answer; raises ServiceError otherwise."""
        request = convert.health_request(CHAT_SERVICE)
        try:
            response = await self._health.Check(request, timeout=seconds)
        except grpc.aio.AioRpcError:
            message = "The model server cannot be reached."
            raise ServiceError("backend_unavailable", message) from None
        if not convert.is_serving(response):
            raise ServiceError("model_loading", "The model server is not ready.")

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


class CompletionStream:
    """The events of one streamed answer."""

    def __init__(self, backend: Backend, call: Any) -> None:
        self._backend = backend
        self._call = call

    async def read(self) -> convert.Event | None:
        """The next event, or None at the end; raises ServiceError."""
        with self._backend.translated():
            response = await self._call.read()
        return None if response is grpc.aio.EOF else convert.stream_event(response)

    def close(self) -> None:
        """Cancels what is not done."""
        self._backend.end(self._call)
