"""Asks a running stage how it is: health, and what model it has.

`python -m trivium.cli.probe grpc://HOST:PORT[/SERVICE] | http://…` exits with 0 when it can serve,
which is what the health checks of containers run.
"""

from __future__ import annotations

import asyncio
import sys

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from trivium.generator.v1 import generator_pb2, generator_pb2_grpc
from trivium.keys.own_key import OwnKey, own_metadata
from trivium.wire.channel import open_channel

POLL_SECONDS = 0.1
CALL_SECONDS = 5.0


async def grpc_is_serving(target: str, service: str = "") -> bool:
    """Whether the gRPC server at `target` (host:port) reports SERVING for `service`.

    The empty name stands for the process: it says nothing of the stages behind.
    """
    async with open_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = await stub.Check(request, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def http_is_ready(url: str) -> bool:
    """Whether a GET of `url` is answered with 200."""
    async with httpx.AsyncClient(timeout=CALL_SECONDS, trust_env=False) as client:
        try:
            return (await client.get(url)).status_code == 200
        except httpx.HTTPError:
            return False


async def until_ready(*addresses: str) -> None:
    """Returns once each of a stage's `addresses`, as in `is_ready`, could serve."""
    for address in addresses:
        while not await is_ready(address):  # noqa: ASYNC110 - another process sets no event of ours
            await asyncio.sleep(POLL_SECONDS)


async def is_ready(address: str) -> bool:
    """Whether the stage at `address` can serve: grpc://host:port, with /service or not; http://…"""
    scheme, _, rest = address.partition("://")
    if scheme != "grpc":
        return await http_is_ready(address)
    target, _, service = rest.partition("/")
    return await grpc_is_serving(target, service)


async def model_info(target: str, key: OwnKey | None) -> generator_pb2.GetModelInfoResponse:
    """What the generator at `target` (host:port) has loaded; `key` is shown to it."""
    async with open_channel(target) as channel:
        stub = generator_pb2_grpc.GeneratorServiceStub(channel)
        request, metadata = generator_pb2.GetModelInfoRequest(), own_metadata(key)
        return await stub.GetModelInfo(request, timeout=CALL_SECONDS, metadata=metadata)


if __name__ == "__main__":
    sys.exit(not asyncio.run(is_ready(sys.argv[1])))
