"""How one process calls another: channels, and the time left for a call."""

import math
from typing import Any

import grpc

from trivium.wire.tls.channel import ChannelTls

MAX_MESSAGE_BYTES = 32 * 1024 * 1024  # of a request; answers are as long as was asked for

_OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # `http_proxy` in the environment is for outbound traffic, not for calls between stages.
    ("grpc.enable_http_proxy", 0),
    # A peer that vanishes silently is detected within 8 s. The ping timeout, a minute by default,
    # would otherwise override the keepalive timeout.
    ("grpc.keepalive_time_ms", 3_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    # Reconnects within a second once the peer is back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

_MAX_DEADLINE_SECONDS = 1e8  # gRPC treats 1e10 s and more as already expired


def open_channel(
    target: str, authority: str | None = None, tls: ChannelTls | None = None
) -> grpc.aio.Channel:
    """A channel to one server: host:port, or any gRPC name; plain text without `tls`.

    `authority` is HTTP/2's `:authority`, and with TLS the name that the server's certificate must
    match; the target's own by default.
    """
    options = list(_OPTIONS)
    if tls is not None and tls.server_name is not None:
        authority = tls.server_name
    if authority is not None:
        options.append(("grpc.default_authority", authority))
    if tls is not None:
        return grpc.aio.secure_channel(target, tls.credentials(), options=options)
    return grpc.aio.insecure_channel(target, options=options)


def revision_service(service: str, revision: str) -> str:
    """The health service name under which replicas of `service` report this model revision."""
    return f"{service}@{revision}"


def remaining_seconds(context: grpc.aio.ServicerContext[Any, Any]) -> float | None:
    """Seconds left until the caller's deadline, to pass on as a timeout; None without one."""
    left = context.time_remaining()
    if left is None or math.isinf(left) or left > _MAX_DEADLINE_SECONDS:
        return None
    return max(float(left), 0.0)
