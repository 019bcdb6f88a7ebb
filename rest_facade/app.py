"""The ASGI application: identity, error boundary and admission around the routes.

IdentityMiddleware        request id and trace of the call; access log; metrics; usage record
  CORSMiddleware          if cors_origins are set; answers preflights, which carry no key
    ErrorMiddleware       every exception becomes OpenAI's error object, or a stream's last event
      AdmissionMiddleware draining, API keys and their limits; counts requests in flight
        routes
"""

import logging
import math
import time
from typing import NoReturn

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rest_facade.backend import Backend
from rest_facade.config import FacadeSettings
from rest_facade.connection import ClientDisconnected
from rest_facade.cors import cors
from rest_facade.errors import ErrorResponse, error_body
from rest_facade.metrics import Metrics
from rest_facade.openapi import RawRoute
from rest_facade.routes import Routes
from rest_facade.sse import sse_event
from rest_facade.usage import COMPLETIONS, begin_usage, refusal_record, usage_of
from trivium.keys.key_file import KeyFile
from trivium.keys.rate_limits import RateLimits
from trivium.usage_log import UsageLog
from trivium.wire import telemetry, tracing
from trivium.wire.errors import CLIENT_LEFT, ERRORS, ServiceError, internal_error
from trivium.wire.in_flight import InFlight
from trivium.wire.span import Span

log = logging.getLogger(__name__)

# Paths that need a key and are refused while draining; all others concern this process only.
_API_PREFIXES = ("/v1/", "/tokenize", "/detokenize", "/tokenizer_info")
_MODEL_PREFIX = "/v1/models/"
_CLIENT_CLOSED_REQUEST = ERRORS[CLIENT_LEFT].http
_IDENTITY_HEADERS = (telemetry.REQUEST_ID.encode(), telemetry.TRACEPARENT.encode())


def build_app(
    settings: FacadeSettings,
    backend: Backend,
    in_flight: InFlight,
    keys: KeyFile | None,
    metrics: Metrics,
    usage_log: UsageLog,
    limits: RateLimits,
) -> FastAPI:
    """Builds the application; the caller owns `backend`, and drains through `in_flight`."""
    metrics.follow(backend.replicas.status, in_flight)
    routes = Routes(settings, backend, in_flight, metrics).router().routes
    app = FastAPI(
        routes=routes,
        openapi_url=None,
        middleware=[
            Middleware(
                IdentityMiddleware,
                metrics=metrics,
                usage_log=usage_log,
                in_flight=in_flight,
                paths=frozenset(route.path for route in routes if isinstance(route, RawRoute)),
            ),
            *cors(settings.allowed_origins),
            Middleware(ErrorMiddleware, metrics=metrics),
            Middleware(AdmissionMiddleware, in_flight=in_flight, keys=keys, limits=limits),
        ],
        exception_handlers={HTTPException: _routing_error},
    )
    app.router.redirect_slashes = False
    return app


async def _routing_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    where = f"{request.method} {path}"
    if error.status_code == 405:
        service_error = ServiceError("method_not_allowed", f"Method not allowed: {where}.")
        return ErrorResponse(service_error, {"allow": ", ".join(sorted(_allowed(request)))})
    if error.status_code == 404:
        # The usual mistakes: a base URL without /v1, and a trailing slash.
        near = "/v1/" + path.strip("/").removeprefix("v1/")
        is_near = any(route.path == near for route in _api_routes(request))
        advice = f"Did you mean {near}?" if is_near else "The docs are at /docs."
        service_error = ServiceError("unknown_url", f"Unknown request URL: {where}. {advice}")
    else:
        raise AssertionError(f"HTTP {error.status_code} is not ours. This is a bug.")
    return ErrorResponse(service_error)


def _allowed(request: Request) -> set[str]:
    """The methods of all routes at a path; Starlette only returns those of the first."""
    at_path = [
        route for route in _api_routes(request) if route.matches(request.scope)[0] is not Match.NONE
    ]
    return {method for route in at_path for method in route.methods or ()}


def _api_routes(request: Request) -> list[RawRoute]:
    return [route for route in request.app.routes if isinstance(route, RawRoute)]


class IdentityMiddleware:
    """Assigns each request an id, returned as a header; logs and counts its outcome."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        usage_log: UsageLog,
        in_flight: InFlight,
        paths: frozenset[str],
    ) -> None:
        self._app = app
        self._usage_log = usage_log
        self._metrics = metrics
        self._in_flight = in_flight
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            _reject_protocol(scope)
        identity = telemetry.adopt(
            (name.decode(), value.decode("latin-1"))
            for name, value in scope["headers"]
            if name in _IDENTITY_HEADERS
        )
        telemetry.key_name.set("")
        begin_usage(scope)
        route = self._route(scope["path"])
        attributes = {
            "http.request.method": scope["method"],
            "http.route": route,
            "url.scheme": scope["scheme"],
            "url.path": scope["path"][:200],
        }
        if scope["path"].startswith(_API_PREFIXES):
            with tracing.call(f"{scope['method']} {route}", attributes, begins=True) as span:
                await self._answer(scope, receive, send, identity, route, span)
        else:
            await self._answer(scope, receive, send, identity, route, tracing.current())

    async def _answer(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        identity: str,
        route: str,
        span: Span,
    ) -> None:
        usage = usage_of(scope)
        status, started_at, sending_since = _CLIENT_CLOSED_REQUEST, time.monotonic(), math.inf

        async def send_with_id(message: Message) -> None:
            nonlocal status, sending_since
            if message["type"] == "http.response.start":
                status, sending_since = message["status"], time.monotonic()
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in usage.headers.items()),
                    (telemetry.REQUEST_ID.encode(), identity.encode()),
                ]
                if self._in_flight.leaving:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            now = time.monotonic()
            span.set({"http.response.status_code": status})
            if status >= 500:
                span.fail("")
            if sending_since < now:
                tracing.record("send", sending_since, now)
            self._record(scope, route, status, now - started_at)
            if scope["path"] in COMPLETIONS and not usage.began:
                self._usage_log.write(refusal_record(usage, status, now - started_at))

    def _route(self, path: str) -> str:
        if path.startswith(_MODEL_PREFIX):
            return _MODEL_PREFIX + "{id}"
        return path if path in self._paths else "other"

    def _record(self, scope: Scope, route: str, status: int, seconds: float) -> None:
        path = scope["path"]
        self._metrics.requests.labels(route, status).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        level = logging.INFO if path.startswith(_API_PREFIXES) else logging.DEBUG
        fields = {
            "method": scope["method"],
            "route": route,
            "path": path[:200],
            "status": status,
            "seconds": round(seconds, 6),
        }
        text = "{method} {path} {status} in {seconds:.3f} s".format_map(fields)
        log.log(level, text, extra={"fields": fields})


def _reject_protocol(scope: Scope) -> NoReturn:
    raise AssertionError(f"{scope['type']} is switched off in the server. This is a bug.")


class ErrorMiddleware:
    """The one broad `except` of this process."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_and_record_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_record_start)
            return
        except ClientDisconnected:
            usage_of(scope).final_status = _CLIENT_CLOSED_REQUEST
            tracing.current().set({"error.type": CLIENT_LEFT})
            self._metrics.disconnects.inc()
            return
        except ServiceError as error:
            service_error = error
        except Exception:
            log.exception("unhandled error in a request")
            service_error = internal_error()
        tracing.current().set({"error.type": service_error.code})
        if not started:
            self._metrics.rejections.labels(service_error.code).inc()
            await ErrorResponse(service_error)(scope, receive, send)
            return
        # Only streams can fail after the response has started.
        usage_of(scope).final_status = service_error.kind.http
        tracing.current().fail(service_error.code)
        self._metrics.stream_errors.labels(service_error.code).inc()
        log.warning("a stream failed: %s: %s", service_error.code, service_error.message)
        # No `[DONE]` follows.
        await send({"type": "http.response.body", "body": sse_event(error_body(service_error))})


class AdmissionMiddleware:
    """Checks API keys, rate limits and draining for the API's paths; all others are open."""

    def __init__(
        self, app: ASGIApp, in_flight: InFlight, keys: KeyFile | None, limits: RateLimits
    ) -> None:
        self._app = app
        self._in_flight = in_flight
        self._keys = keys
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].startswith(_API_PREFIXES):
            await self._app(scope, receive, send)
            return
        with self._in_flight.admitted():
            if self._keys is not None:
                key = self._keys.check(Request(scope).headers.get("authorization", ""))
                if key.stage:
                    raise ServiceError(
                        "invalid_api_key", "This key is for calls between stages only."
                    )
                telemetry.key_name.set(key.name)
                usage = usage_of(scope)
                usage.key = key
                if scope["path"] in COMPLETIONS:
                    async with self._limits.admitted(key, usage):
                        await self._app(scope, receive, send)
                    return
            await self._app(scope, receive, send)
