"""How a process serves gRPC: bind, health, reflection, drain.

Knows nothing about the services themselves.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from trivium.wire.call_boundary import CallBoundary, Guard, Refused
from trivium.wire.channel import MAX_MESSAGE_BYTES
from trivium.wire.errors import ServiceError
from trivium.wire.in_flight import InFlight, wait_for_any
from trivium.wire.tls.server import ServerTls

Result = TypeVar("Result")

_OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
    # Calls waiting to be picked up. Above 1,000, gRPC would reset some at random, without telling
    # their callers why. Admission control refuses the excess instead.
    ("grpc.server.max_pending_requests", 2**31 - 1),
    ("grpc.server.max_pending_requests_hard_limit", 2**31 - 1),
    # Clients may ping as often as they like; by default gRPC hangs up with "Too many pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
    # A caller that vanishes silently is detected within 20 s. Its calls would otherwise run to the
    # end and hold their resources. A shorter timeout would drop clients that are busy for a while.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    # Calls on a connection past its maximum age may finish, however long the answer.
    ("grpc.max_connection_age_grace_ms", 3_600_000),
]

MAX_CONNECTION_AGE_SECONDS = 60.0

_FLUSH_TIMEOUT_SECONDS = 0.5  # for the last responses of finished handlers to be sent
_NOTIFY_SECONDS = 0.1  # for watchers to be notified and the GOAWAY to be sent

_STATE = health_pb2.HealthCheckResponse.ServingStatus


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # untyped
    """A health service that reports a drain in two steps.

    Load balancers and probes, which poll, see it at once and stop sending calls. gRPC channels,
    which watch, would then leave without resolving the name again, so they are told together with
    the GOAWAY, which makes them do so. Then their watches end: behind a proxy with one address for
    all replicas, the next watch reaches a replica that stays, however long the last calls here run.

    Unlike grpc_health's, it holds no lock while a watcher is written to: one that reads nothing
    would keep the state from changing for everybody, and the process from draining.
    """

    def __init__(self, in_flight: InFlight) -> None:
        self._in_flight = in_flight
        self._states: dict[str, int] = {}  # by service
        self._changed = asyncio.Event()  # replaced after each change
        self._left = False

    def set(self, name: str, serving: bool) -> None:
        """Sets a service's state, unless `leave` was called."""
        if not self._left:
            self._states[name] = _STATE.SERVING if serving else _STATE.NOT_SERVING
            self._notify()

    def is_serving(self, name: str) -> bool:
        """Whether a service is set as SERVING."""
        return bool(self._states.get(name) == _STATE.SERVING)

    def leave(self) -> None:
        """Reports all services as NOT_SERVING from now on, and ends all watches."""
        self._states = dict.fromkeys(self._states, _STATE.NOT_SERVING)
        self._left = True
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _checked(self, name: str) -> int:
        return _STATE.NOT_SERVING if self._in_flight.leaving else self._states[name]

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        if request.service not in self._states:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return health_pb2.HealthCheckResponse(status=self._checked(request.service))

    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        answer = health_pb2.HealthListResponse()
        for name in self._states:
            answer.statuses[name].status = self._checked(name)
        return answer

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        reported = None
        while True:
            changed, is_last = self._changed, self._left
            state = self._states.get(request.service, _STATE.SERVICE_UNKNOWN)
            if state != reported:
                reported = state
                yield health_pb2.HealthCheckResponse(status=state)
            elif is_last:
                break
            else:
                await changed.wait()
        await asyncio.sleep(_NOTIFY_SECONDS)


class GrpcServer:
    """A gRPC server with health and reflection that starts as NOT_SERVING and drains when it stops.

    `services` pairs each servicer's `add_…_to_server` with the servicer; `names` are the
    full service names for health and reflection, `health_names` further ones for health.
    gRPC clients resolve a name again only when a connection ends, so each ends after
    `max_connection_age_seconds`: new replicas get their share of the calls within this time.
    `in_flight` is for servicers that need to know about the drain. `guard` admits the calls of all
    services but health and reflection; `refused` is called for those it refuses. Without `tls`, it
    serves plain text.
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
        refused: Refused | None = None,
    ) -> None:
        self._in_flight = in_flight or InFlight()
        self._tls = tls
        self._tls_reload: asyncio.Task[None] | None = None
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
        """Binds `address` (host:port, port 0 for any) and returns the port. Still NOT_SERVING.

        Raises OSError if it cannot be bound.
        """
        self.set_serving(False)
        try:
            if self._tls is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._tls.grpc_credentials())
                self._tls_reload = asyncio.create_task(self._tls.follow())
        except RuntimeError as error:
            raise OSError(f"{address} cannot be bound") from error  # gRPC has logged why
        await self._server.start()
        return int(port)

    def set_serving(self, serving: bool, names: Sequence[str] | None = None) -> None:
        """Reports all services, or those in `names`, as SERVING or NOT_SERVING."""
        for name in self._names if names is None else names:
            self._health.set(name, serving)

    async def check_ready(self, name: str) -> None:
        """Raises ServiceError unless health checks report this service as SERVING."""
        self._in_flight.check_ready()
        if not self._health.is_serving(name):
            raise ServiceError("model_loading", f"{name or 'The process'} is not ready.")

    async def drain(
        self, notice_seconds: float, drain_seconds: float, stop_now: asyncio.Event | None = None
    ) -> None:
        """Shuts down without losing a call; docs/operations.md says what callers see.

        For `notice_seconds` everything is served as before, but health checks fail. Then the
        port is closed, callers are sent elsewhere, and calls in flight get `drain_seconds`; the
        rest end as `draining`. Setting `stop_now` skips the waiting.
        """
        stop_now = stop_now or asyncio.Event()
        self._in_flight.leaving = True
        await wait_for_any(notice_seconds, stop_now)
        self._health.leave()
        stopping = asyncio.create_task(self._server.stop(drain_seconds + _FLUSH_TIMEOUT_SECONDS))
        await self._boundary.drain(drain_seconds, stop_now)
        # Health and reflection calls, which the boundary does not track, get this time only.
        await self._server.stop(_FLUSH_TIMEOUT_SECONDS)
        await stopping
        if self._tls_reload is not None:
            self._tls_reload.cancel()


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Runs `main` on uvloop, with which gRPC handles a fifth more messages."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
