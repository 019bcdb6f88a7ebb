"""How a process serves gRPC: bind, health, reflection, the boundary of every call, drain.

Knows nothing about what is served.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

import grpc
import uvloop
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from trivium.wire import telemetry, tracing
from trivium.wire.channel import MAX_MESSAGE_BYTES, remaining_seconds
from trivium.wire.errors import ServiceError, code_of, from_rpc_error, internal_error
from trivium.wire.in_flight import InFlight
from trivium.wire.tls.server import ServerTls

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    # Calls that wait to be picked up; of more than 1,000, gRPC would reset some at random, so that
    # their callers never hear why. What is too much is refused by whoever knows it.
    ("grpc.server.max_pending_requests", 2**31 - 1),
    ("grpc.server.max_pending_requests_hard_limit", 2**31 - 1),
    # Clients may ping as they like; the default answers "Too many pings" and hangs up.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
    # What runs on a connection that is too old may go on for as long as the longest answer.
    ("grpc.max_connection_age_grace_ms", 3_600_000),
]

MAX_CONNECTION_AGE_SECONDS = 60.0

_OURS = "/trivium."
_PUBLIC = "/trivium.chat."  # services that anybody may call; the others are for the stage before
_FLUSH_TIMEOUT_SECONDS = 0.5  # for answers whose handlers have returned to reach the wire
_ON_THE_WAY_SECONDS = 0.05  # a call, at most, from its caller to here
_LAST_WORD_SECONDS = 0.1  # for watchers to be told, and the GOAWAY to be sent


class Guard(Protocol):
    """Decides which calls are let in."""

    def admitted(self, method: str, context: Any) -> contextlib.AbstractAsyncContextManager[None]:
        """Around a call of `method`, /package.Service/Method; raises ServiceError if it may not be
        made."""


class _Open:
    """Lets everything in."""

    def admitted(self, method: str, context: Any) -> contextlib.AbstractAsyncContextManager[None]:
        return contextlib.nullcontext()


# Told the method and the error's code of a call that no handler has seen.
Refused = Callable[[str, str], None]


def _uncounted(method: str, code: str) -> None:
    pass


class CallBoundary(grpc.aio.ServerInterceptor):
    """The one broad `except`: whatever a handler raises becomes a status, and nothing leaks.

    An unhandled exception's text would reach the caller, and a BaseException would never
    be answered at all. Knows the calls in flight, of which a drain can cut what takes too long.
    """

    def __init__(
        self, in_flight: InFlight, guard: Guard | None = None, refused: Refused = _uncounted
    ) -> None:
        self._in_flight = in_flight
        self._guard = guard or _Open()
        self._refused = refused
        self._handlers: dict[str, Any] = {}  # by method
        self._running: set[asyncio.Task[Any]] = set()
        self._sending: set[asyncio.Task[Any]] = set()  # their handlers cannot be interrupted
        self._cut: dict[asyncio.Task[Any], ServiceError] = {}  # calls that end as this error

    async def drain(self, seconds: float, hurry: asyncio.Event) -> None:
        """Refuses new calls and waits until none runs; ends those that still do after `seconds`,
        or when `hurry` is set."""
        self._in_flight.draining.set()
        await wait_for_any(seconds, self._in_flight.idle, hurry)
        for call in self._running:
            message = "The server is shutting down, and its time to finish calls is over."
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
    async def _let_in(
        self, method: str, context: Any, request: Any
    ) -> AsyncIterator[asyncio.Task[Any]]:
        is_in = False
        try:
            with self._admitted() as call:
                async with self._guard.admitted(method, context):
                    if request is _UNDECODABLE:
                        raise _undecodable()
                    is_in = True
                    yield call
        except ServiceError as error:
            if not is_in:
                self._refused(method, error.code)
            raise

    def _check_cut(self, call: asyncio.Task[Any]) -> None:
        if call in self._cut:
            raise self._cut[call] from None

    async def _decoded(self, requests: Any, call: asyncio.Task[Any]) -> AsyncIterator[Any]:
        """The messages of a call, which ends at one that cannot be decoded, whoever reads it."""
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
        if handler is None or not method.startswith(_OURS):
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
            _total(handler.request_deserializer),
            handler.response_serializer,
        )

    def _bounded_unary(self, inner: Any, method: str, reads_stream: bool) -> Any:
        async def behaviour(request: Any, context: Any) -> Any:
            _adopt(context)
            try:
                with _accessed(method):
                    async with self._let_in(method, context, request) as call:
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
                with _accessed(method):
                    async with self._let_in(method, context, request) as call:
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


def _total(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Reads what cannot be decoded as _UNDECODABLE. gRPC itself would fail the call before its key
    has been looked at, tell the caller the exception's text, and log it as a fault."""

    def deserialized(message: bytes) -> Any:
        try:
            return deserialize(message)
        except DecodeError:
            return _UNDECODABLE

    return deserialized


def _undecodable() -> ServiceError:
    return ServiceError("invalid_value", "The message cannot be decoded.")


@contextlib.contextmanager
def _accessed(method: str) -> Iterator[None]:
    """Logs a call at its end, and is the call's span in its trace."""
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
    """Makes the current context that of this call, whose answer has its request id in the trailing
    metadata: the initial may be sent only once, and limits do."""
    request_id = telemetry.adopt(context.invocation_metadata() or ())
    context.set_trailing_metadata(((telemetry.REQUEST_ID, request_id),))
    # Callers hang up at their own deadline; the one they tell may be 1% later, as gRPC rounds it.
    left = remaining_seconds(context)
    late_from = math.inf if left is None else time.monotonic() + 0.98 * left - _ON_THE_WAY_SECONDS
    telemetry.late_from.set(late_from)


async def _abort(context: Any, error: BaseException) -> NoReturn:
    if isinstance(error, grpc.aio.AioRpcError):
        error = from_rpc_error(error)
    if not isinstance(error, ServiceError):
        log.error("unhandled error in a call", exc_info=error)
        error = internal_error()
    status: Any = error.status()  # its trailing metadata replace the call's
    trailing = (*status.trailing_metadata, *context.trailing_metadata())
    await context.abort_with_status(status._replace(trailing_metadata=trailing))
    raise AssertionError("abort_with_status returned. This is a bug.")


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # has no types
    """Health that tells of a drain twice.

    Load balancers and probes, which poll, hear of it at once and stop sending. gRPC's channels,
    which watch, would then leave without asking where to go instead: they hear of it together
    with the GOAWAY that makes them resolve the server's name anew. Then their watches end. Where a
    proxy takes all replicas for one address, the next watch is on a replica that stays, however
    long this one's last calls run.
    """

    def __init__(self, in_flight: InFlight) -> None:
        super().__init__()
        self._in_flight = in_flight
        self._left = asyncio.Event()

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        response = await super().Check(request, context)
        if self._in_flight.leaving:
            response.status = health_pb2.HealthCheckResponse.NOT_SERVING
        return response

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802 - gRPC's name
        watching = asyncio.ensure_future(super().Watch(request, context))
        leaving = asyncio.ensure_future(self._left.wait())
        try:
            await asyncio.wait((watching, leaving), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(_LAST_WORD_SECONDS)
        finally:
            leaving.cancel()
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def enter_graceful_shutdown(self) -> None:
        await super().enter_graceful_shutdown()
        self._left.set()


class GrpcServer:
    """A gRPC server with health and reflection that starts NOT_SERVING and drains at its end.

    `services` pairs each servicer's `add_…_to_server` with the servicer; `names` are the
    full service names for health and reflection, `health_names` further ones for health.
    gRPC clients resolve a name anew only when a connection ends, so each ends after
    `max_connection_age_seconds`: new replicas get their share of the calls within this time.
    `in_flight` is for servicers that have to know of the drain. `guard` lets calls in, of all
    services but health and reflection, and `refused` hears of those that are not. Without `tls` it
    speaks plain text.
    """

    def __init__(
        self,
        services: Sequence[tuple[Callable[..., None], object]],
        names: Sequence[str],
        health_names: Sequence[str] = (),
        max_connection_age_seconds: float = MAX_CONNECTION_AGE_SECONDS,
        in_flight: InFlight | None = None,
        guard: Guard | None = None,
        has_reflection: bool = True,
        tls: ServerTls | None = None,
        refused: Refused = _uncounted,
    ) -> None:
        self._in_flight = in_flight or InFlight()
        self._tls = tls
        self._following: asyncio.Task[None] | None = None
        self._serving: dict[str, bool] = {}
        self._boundary = CallBoundary(self._in_flight, guard, refused)
        age = ("grpc.max_connection_age_ms", int(max_connection_age_seconds * 1000))
        self._server = grpc.aio.server(interceptors=[self._boundary], options=[*_OPTIONS, age])
        self._names = ("", *names, *health_names)
        self._health = Health(self._in_flight)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for add, servicer in services:
            add(servicer, self._server)
        if has_reflection:
            reflection.enable_server_reflection(
                (*names, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
            )

    async def start(self, address: str) -> int:
        """Binds `address` (host:port, port 0 for any) and returns the port. Not yet SERVING.

        Raises OSError if it cannot be bound.
        """
        await self.set_serving(False)
        try:
            if self._tls is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._tls.grpc_credentials())
                self._following = asyncio.create_task(self._tls.follow())
        except RuntimeError as error:
            raise OSError(f"{address} cannot be bound") from error  # gRPC has logged why
        await self._server.start()
        return int(port)

    async def set_serving(self, serving: bool, names: Sequence[str] | None = None) -> None:
        """Reports all services, or those named, as SERVING or NOT_SERVING."""
        state = health_pb2.HealthCheckResponse.ServingStatus
        for name in self._names if names is None else names:
            self._serving[name] = serving
            await self._health.set(name, state.SERVING if serving else state.NOT_SERVING)

    async def check_ready(self, name: str) -> None:
        """Raises ServiceError unless health checks find this service SERVING."""
        self._in_flight.check_ready()
        if not self._serving.get(name):
            raise ServiceError("model_loading", f"{name or 'The process'} is not ready.")

    async def drain(
        self, notice_seconds: float, drain_seconds: float, hurry: asyncio.Event | None = None
    ) -> None:
        """Ends without a call being lost; docs/operations.md says what callers see.

        For `notice_seconds` everything is served as before, but health checks fail. Then the
        port is closed, callers are sent elsewhere, and running calls get `drain_seconds`; what
        is left of them ends as `draining`. Once `hurry` is set nothing is waited for.
        """
        hurry = hurry or asyncio.Event()
        self._in_flight.leaving = True
        await wait_for_any(notice_seconds, hurry)
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.create_task(self._server.stop(drain_seconds + _FLUSH_TIMEOUT_SECONDS))
        await self._boundary.drain(drain_seconds, hurry)
        # Calls that watch the health never end by themselves, so they are not waited for.
        await self._server.stop(_FLUSH_TIMEOUT_SECONDS)
        await stopping
        if self._following is not None:
            self._following.cancel()


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Runs `main` to its end on uvloop, on which gRPC passes a fifth more messages."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


async def wait_for_any(seconds: float, *events: asyncio.Event) -> None:
    """Returns when one of `events` is set, or after `seconds`."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
