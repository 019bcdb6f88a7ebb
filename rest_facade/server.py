"""Runs the application: listens, and drains at a stop signal."""

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Iterator

import uvicorn
from prometheus_client.registry import CollectorRegistry
from starlette.types import ASGIApp

from rest_facade.app import build_app
from rest_facade.backend import Backend
from rest_facade.config import FacadeSettings
from rest_facade.http_limits import LimitedHttpProtocol
from rest_facade.metrics import Metrics
from trivium.keys.key_file import KeyFile
from trivium.keys.settings import open_limits, open_own_key
from trivium.usage_log import UsageLog
from trivium.wire.errors import ServiceError
from trivium.wire.in_flight import InFlight, wait_for_any
from trivium.wire.listening import address_of, bind_error_message
from trivium.wire.metrics_server import serve_metrics
from trivium.wire.settings import refuse_to_start
from trivium.wire.stop_signals import StopSignals
from trivium.wire.tls.metrics import CertificateCollector
from trivium.wire.tls.server import ServerTls

log = logging.getLogger(__name__)

_BACKLOG = 65_535  # pending connections; the system's own limit (somaxconn) applies
_FLUSH_TIMEOUT_SECONDS = 5  # to send the error events of streams that were cut off


class _Server(uvicorn.Server):
    """uvicorn without its signal handling, which would close the port at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(settings: FacadeSettings, keys: KeyFile | None) -> None:
    """Serves until a stop signal, then drains; raises SystemExit if a port is in use."""
    in_flight = InFlight()
    metrics = Metrics()
    usage_log = _open_usage_log(settings, metrics.registry)
    signals = StopSignals()
    own_key = open_own_key("TRIVIUM_FACADE_TOKENIZER_API_KEY_FILE", settings.tokenizer_api_key_file)
    tls, tokenizer_tls = settings.server_tls(), settings.tokenizer_tls()
    metrics.registry.register(CertificateCollector(tls, tokenizer_tls))
    timeout = settings.request_timeout_seconds
    async with Backend(
        settings.tokenizer_target,
        timeout,
        own_key,
        tokenizer_tls,
        forwards_key_names=keys is not None,
    ) as backend:
        limits = open_limits("TRIVIUM_FACADE_LIMITS_URL", settings.limits_url, metrics.registry)
        app = build_app(settings, backend, in_flight, keys, metrics, usage_log, limits)
        server = _server(app, settings, tls)
        sockets = _listening_sockets(settings)

        async def check_ready() -> None:
            in_flight.check_ready()
            if not server.started:
                raise ServiceError("model_loading", "The REST API is not up yet.")
            await backend.check(settings.health_timeout_seconds)

        try:
            serve_metrics(settings.metrics_port, settings.host, metrics.registry, check_ready)
        except OSError as error:
            refuse_to_start(f"TRIVIUM_FACADE_{error}")
        following = None if tls is None else asyncio.create_task(tls.follow())
        address = address_of(settings.host, sockets[0].getsockname()[1])
        log.info("listening on %s", address)
        stopper = asyncio.create_task(_drain(settings, server, in_flight, backend, signals))
        try:
            await server.serve(sockets)
        finally:
            stopper.cancel()
            if following is not None:
                following.cancel()
            await limits.close()
            usage_log.close()


def _server(app: ASGIApp, settings: FacadeSettings, tls: ServerTls | None) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            http=LimitedHttpProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=settings.idle_connection_seconds,
            timeout_graceful_shutdown=_FLUSH_TIMEOUT_SECONDS,
            ssl_context_factory=None if tls is None else lambda *_: tls.http_context(),
        )
    )


def _open_usage_log(settings: FacadeSettings, registry: CollectorRegistry) -> UsageLog:
    try:
        return UsageLog(
            settings.usage_log,
            settings.log_name,
            settings.usage_log_max_bytes,
            settings.usage_log_backups,
            registry,
        )
    except OSError as error:
        refuse_to_start(f"TRIVIUM_FACADE_USAGE_LOG: {error}")


def _listening_sockets(settings: FacadeSettings) -> list[socket.socket]:
    """`::` includes IPv4, as with gRPC. Facades that share a port have a backlog each.

    Addresses that this host lacks are skipped: `localhost` may include ::1 on one without IPv6.
    """
    sockets, missing = [], None
    try:
        for family, _, _, _, address in socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            try:
                listener = socket.create_server(
                    address,
                    family=family,
                    backlog=_BACKLOG,
                    reuse_port=settings.reuse_port,
                    dualstack_ipv6=family == socket.AF_INET6 and socket.has_dualstack_ipv6(),
                )
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
            else:
                sockets.append(listener)
        if not sockets and missing is not None:
            raise missing
    except OSError as error:  # also a host name that cannot be resolved
        why = bind_error_message(settings.host, settings.port, error)
        refuse_to_start(f"TRIVIUM_FACADE_PORT: {why}")
    return sockets


async def _drain(
    settings: FacadeSettings,
    server: uvicorn.Server,
    in_flight: InFlight,
    backend: Backend,
    signals: StopSignals,
) -> None:
    await signals.first.wait()
    log.info("draining")
    in_flight.leaving = True
    await wait_for_any(settings.drain_notice_seconds, signals.second)
    # The port stays open, so that late requests get an error with the reason.
    in_flight.draining.set()
    # Pooled connections are closed, so that clients connect to another replica. A connection
    # without a request so far stays open: its first one may be on its way, and gets a 503.
    for connection in list(server.server_state.connections):
        if isinstance(connection, LimitedHttpProtocol) and connection.cycle is not None:
            connection.shutdown()
    await wait_for_any(settings.drain_seconds, in_flight.idle, signals.second)
    backend.cancel_all()
    server.should_exit = True
