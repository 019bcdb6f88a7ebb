"""How one stage reaches the next: a channel to all its replicas, and the time left for a call."""

import json
import math
from collections.abc import AsyncGenerator
from typing import Any

import grpc

MAX_MESSAGE_BYTES = 32 * 1024 * 1024

# When the last replica is replaced there is none until its successor's address is known and
# connected, which calls wait out. Only what takes longer is an outage.
GAP_SECONDS = 2.0

_ROUND_ROBIN: list[dict[str, Any]] = [{"round_robin": {}}]
# Four attempts within 1.2 to 1.8 s, longer than DNS has to wait below. gRPC repeats a call only
# while nothing of its answer has come. There is no throttling of retries: the calls that a dying
# replica drops all at once are just those that have to be repeated, and overload is
# RESOURCE_EXHAUSTED, which is not.
_RETRY = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "backoffMultiplier": 4,
    "maxBackoff": "1s",
    # A server ends as CANCELLED what reaches it while it is sending GOAWAY.
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
}

_OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # `http_proxy` in the environment is for the way out, not for one stage to reach the next.
    ("grpc.enable_http_proxy", 0),
    # A peer that stops without a word is noticed within 8 s. The ping's own timeout, a minute by
    # default, would decide instead of the keepalive's.
    ("grpc.keepalive_time_ms", 3_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    # One that is back is found within a second, and so are the addresses of its successors.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
]
_REPLICA_OPTIONS: list[tuple[str, str | int]] = [
    # The largest request can be repeated too; by default only those below 256 KiB.
    ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES + 64 * 1024),
    # The state of the channel tells whether there are replicas, so it must not fall asleep.
    ("grpc.client_idle_timeout_ms", 2**31 - 1),
]

_MAX_DEADLINE_SECONDS = 1e8  # gRPC takes 1e10 s and more as already expired


def open_channel(target: str, health_service: str | None = None) -> grpc.aio.Channel:
    """A channel to `target` (host:port, or any gRPC name such as dns:///host:port).

    With `health_service`, calls go only to replicas that report this name as SERVING, and one
    that is refused or broken off before it is answered is tried again. The channel is READY while
    there is such a replica.
    """
    config: dict[str, Any] = {"loadBalancingConfig": _ROUND_ROBIN}
    options = list(_OPTIONS)
    if health_service is not None:
        config["healthCheckConfig"] = {"serviceName": health_service}
        config["methodConfig"] = [{"name": [{}], "retryPolicy": _RETRY}]
        options += _REPLICA_OPTIONS
    options.append(("grpc.service_config", json.dumps(config)))
    return grpc.aio.insecure_channel(target, options=options)


async def serving(channel: grpc.aio.Channel) -> AsyncGenerator[bool]:
    """Whether a channel with a `health_service` has a replica: at once, then at every change."""
    while True:
        state = channel.get_state(try_to_connect=True)
        yield state is grpc.ChannelConnectivity.READY
        await channel.wait_for_state_change(state)


def revision_service(service: str, revision: str) -> str:
    """The name by which replicas of `service` report the health of this model revision."""
    return f"{service}@{revision}"


def remaining_seconds(context: grpc.aio.ServicerContext[Any, Any]) -> float | None:
    """What is left of the caller's deadline, to hand on as a timeout; None without one."""
    left = context.time_remaining()
    if left is None or math.isinf(left) or left > _MAX_DEADLINE_SECONDS:
        return None
    return max(float(left), 0.0)
