"""How one stage reaches the next: a channel that heals by itself, and the time left for a call."""

import json
import math
from typing import Any

import grpc

MAX_MESSAGE_BYTES = 32 * 1024 * 1024

_SERVICE_CONFIG = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})

_OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.service_config", _SERVICE_CONFIG),
    # `http_proxy` in the environment is for the way out, not for one stage to reach the next.
    ("grpc.enable_http_proxy", 0),
    # A peer that is gone without a word is noticed; one that is back is found within a second.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

_LONGEST_DEADLINE_SECONDS = 1e8  # gRPC takes 1e10 s and more as already expired


def open_channel(target: str) -> grpc.aio.Channel:
    """A channel to `target` (host:port, or any gRPC name such as dns:///host:port)."""
    return grpc.aio.insecure_channel(target, options=_OPTIONS)


def remaining_seconds(context: grpc.aio.ServicerContext[Any, Any]) -> float | None:
    """What is left of the caller's deadline, to hand on as a timeout; None without one."""
    left = context.time_remaining()
    if left is None or math.isinf(left) or left > _LONGEST_DEADLINE_SECONDS:
        return None
    return max(float(left), 0.0)
