"""The boundary of every call a process serves: admission, errors that may leave, the access log."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NoReturn, Protocol

import grpc
from google.protobuf.message import DecodeError

from trivium.wire import telemetry, tracing
from trivium.wire.channel import remaining_seconds
from trivium.wire.errors import ServiceError, code_of, internal_error
from trivium.wire.in_flight import InFlight, wait_for_any

log = logging.getLogger(__name__)

_OWN_SERVICES = "/trivium."
_PUBLIC = "/trivium.chat."  # services for any client; all others are for the preceding stage
_MAX_TRANSIT_SECONDS = 0.05  # upper bound for a call to get here from its caller


class Guard(Protocol):
    """Decides which calls are let in."""

    def admitted(self, method: str, context: Any) -> contextlib.AbstractAsyncContextManager[None]:
        """Wraps a call of `method`, /package.Service/Method; raises ServiceError to refuse it."""


class _Open:
    """Lets everything in."""

    def admitted(self, method: str, context: Any) -> contextlib.AbstractAsyncContextManager[None]:
        return contextlib.nullcontext()


# Called with the method and error code of a call that was refused before any handler saw it.
Refused = Callable[[str, str], None]


class CallBoundary(grpc.aio.ServerInterceptor):
    """The one broad `except`: whatever a handler raises becomes a status, and nothing leaks.

    Otherwise, an unhandled exception's text would reach the caller, and a BaseException would
    never be answered at all. Tracks the calls in flight, so that a drain can cut off slow ones.
    """

    def __init__(
        self, in_flight: InFlight, guard: Guard | None = None, refused: Refused | None = None
    ) -> None:
        self._in_flight = in_flight
        self._guard = guard or _Open()
        self._refused = refused or (lambda method, code: None)
        self._handlers: dict[str, Any] = {}  # by method
        self._running: set[asyncio.Task[Any]] = set()
        self._sending: set[asyncio.Task[Any]] = set()  # suspended at a yield: not cancelled
        self._cut: dict[asyncio.Task[Any], ServiceError] = {}  # the errors that end calls

    async def drain(self, seconds: float, stop_now: asyncio.Event) -> None:
        """Refuses new calls and waits until none is running; after `seconds`, or once `stop_now` is
        set, ends the rest."""
        self._in_flight.draining.set()
        await wait_for_any(seconds, self._in_flight.idle, stop_now)
        for call in self._running:
            message = "The server is shutting down, and its drain time is over."
            self._cut_off(call, ServiceError("draining", message))

    def _cut_off(self, call: asyncio.Task[Any], error: ServiceError) -> None:
        self._cut[call] = error
        if call not in self._sending:
            call.cancel()

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[asyncio.Task[Any]]:
        call = asyncio.current_task()
        assert call is not None, "A call is handled outside a task. This is a bug."
        with self._in_flight.admitted():
            self._running.add(call)
            try:
                yield call
            except asyncio.CancelledError:
                self._check_cut(call)
                raise
            finally:
                self._sending.discard(call)
                self._running.discard(call)
                self._cut.pop(call, None)

    @contextlib.asynccontextmanager
    async def _guarded(
        self, method: str, context: Any, request: Any
    ) -> AsyncIterator[asyncio.Task[Any]]:
        is_admitted = False
        try:
            with self._admitted() as call:
                async with self._guard.admitted(method, context):
                    if request is _UNDECODABLE:
                        raise _undecodable()
                    is_admitted = True
                    yield call
        except ServiceError as error:
            if not is_admitted:
                self._refused(method, error.code)
            raise

    def _check_cut(self, call: asyncio.Task[Any]) -> None:
        if call in self._cut:
            raise self._cut[call] from None

    async def _decoded(self, requests: Any, call: asyncio.Task[Any]) -> AsyncIterator[Any]:
        """The messages of a call; one that cannot be decoded ends it, whichever task reads it."""
        async for request in requests:
            if request is not _UNDECODABLE:
                yield request
            elif asyncio.current_task() is call:
                raise _undecodable()
            else:
                self._cut_off(call, _undecodable())
                return

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = handler_call_details.method
        if method in self._handlers:
            return self._handlers[method]
        handler = await continuation(handler_call_details)
        if handler is None or not method.startswith(_OWN_SERVICES):
            return handler
        self._handlers[method] = bounded = self._bounded(handler, method)
        return bounded

    def _bounded(self, handler: Any, method: str) -> Any:
        requests = "stream" if handler.request_streaming else "unary"
        if handler.response_streaming:
            kind, bounded = f"{requests}_stream", self._bounded_stream
        else:
            kind, bounded = f"{requests}_unary", self._bounded_unary
        return getattr(grpc, f"{kind}_rpc_method_handler")(
            bounded(getattr(handler, kind), method, handler.request_streaming),
            _safe_deserializer(handler.request_deserializer),
            handler.response_serializer,
        )

    def _bounded_unary(self, inner: Any, method: str, reads_stream: bool) -> Any:
        async def behaviour(request: Any, context: Any) -> Any:
            _adopt(context)
            try:
                with _logged(method):
                    async with self._guarded(method, context, request) as call:
                        received = self._decoded(request, call) if reads_stream else request
                        return await inner(received, context)
            except (asyncio.CancelledError, grpc.aio.AbortError):
                raise
            except BaseException as error:
                await _abort(context, error)

        return behaviour

    def _bounded_stream(self, inner: Any, method: str, reads_stream: bool) -> Any:
        async def behaviour(request: Any, context: Any) -> AsyncIterator[Any]:
            _adopt(context)
            try:
                with _logged(method):
                    async with self._guarded(method, context, request) as call:
                        received = self._decoded(request, call) if reads_stream else request
                        async with contextlib.aclosing(inner(received, context)) as responses:
                            async for response in responses:
                                self._sending.add(call)
                                yield response
                                self._sending.discard(call)
                                self._check_cut(call)
            except (asyncio.CancelledError, GeneratorExit, grpc.aio.AbortError):
                raise
            except BaseException as error:
                await _abort(context, error)

        return behaviour


_UNDECODABLE = object()


def _safe_deserializer(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Turns a message that cannot be decoded into _UNDECODABLE. gRPC itself would fail the call
    before its key is checked, send the exception's text to the caller, and log an error."""

    def deserialized(message: bytes) -> Any:
        try:
            return deserialize(message)
        except DecodeError:
            return _UNDECODABLE

    return deserialized


def _undecodable() -> ServiceError:
    return ServiceError("invalid_value", "The message cannot be decoded.")


@contextlib.contextmanager
def _logged(method: str) -> Iterator[None]:
    """Logs a call when it ends, and records its span."""
    code, began = "ok", time.perf_counter()
    is_public = method.startswith(_PUBLIC)
    attributes = {"rpc.system.name": "grpc", "rpc.method": method[1:]}
    with tracing.call(method[1:], attributes, begins=is_public):
        try:
            yield
        except BaseException as error:
            code = code_of(error)
            raise
        finally:
            seconds = time.perf_counter() - began
            fields = {"method": method[1:], "code": code, "seconds": round(seconds, 6)}
            level = logging.INFO if is_public else logging.DEBUG
            text = "{method} {code} in {seconds:.3f} s".format_map(fields)
            log.log(level, text, extra={"fields": fields})


def _adopt(context: Any) -> None:
    """Sets the context variables for this call, and its request id in the trailing metadata: the
    initial metadata can be sent only once, and rate limits send it."""
    request_id = telemetry.adopt(context.invocation_metadata() or ())
    context.set_trailing_metadata(((telemetry.REQUEST_ID, request_id),))
    # Callers hang up at their own deadline; the one they send may be 1% later, as gRPC rounds it.
    left = remaining_seconds(context)
    deadline_at = (
        math.inf if left is None else time.monotonic() + 0.98 * left - _MAX_TRANSIT_SECONDS
    )
    telemetry.deadline_at.set(deadline_at)


async def _abort(context: Any, error: BaseException) -> NoReturn:
    if not isinstance(error, ServiceError):
        log.error("unhandled exception in a call", exc_info=error)
        error = internal_error()
    status: Any = error.status()  # its trailing metadata would replace the call's
    trailing = (*status.trailing_metadata, *context.trailing_metadata())
    await context.abort_with_status(status._replace(trailing_metadata=trailing))
    raise AssertionError("abort_with_status returned. This is a bug.")
