"""Queries a running stage: its health, and its model.

`python -m trivium.cli.probe grpc://HOST:PORT[/SERVICE] | http://… | https://…` exits with 0 when it
can serve, which is what the health checks of containers run. It probes local servers, so it does
not verify certificates over HTTPS; gRPC over TLS is only available to callers of this module.
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
from trivium.wire.tls.channel import ChannelTls

POLL_SECONDS = 0.1
CALL_SECONDS = 5.0


async def _grpc_fault(target: str, service: str, tls: ChannelTls | None) -> str:
    """Empty if the gRPC server at `target` (host:port) reports SERVING for `service`, else why not.

    The empty service name stands for the process, whatever the state of the stages behind it.
    """
    async with open_channel(target, tls=tls) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = await stub.Check(request, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            return error.details() or error.code().name
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return ""
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def _http_fault(url: str) -> str:
    """Empty if a GET of `url` returns 200, else why not."""
    async with local_client(CALL_SECONDS) as client:
        try:
            answer = await client.get(url)
        except httpx.HTTPError as error:
            return str(error) or type(error).__name__
    if answer.status_code == 200:
        return ""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, TypeError, KeyError):  # not an error of the REST API
        return answer.text.strip() or f"status {answer.status_code}"


def local_client(seconds: float) -> httpx.AsyncClient:
    """A client for a local process, whatever name its certificate is for."""
    return httpx.AsyncClient(timeout=seconds, trust_env=False, verify=False)  # noqa: S501 - see above


async def until_ready(*addresses: str, tls: ChannelTls | None = None) -> None:
    """Returns once each of a stage's `addresses`, as in `is_ready`, has been ready."""
    for address in addresses:
        while not await is_ready(address, tls):  # noqa: ASYNC110 - another process sets no event of ours
            await asyncio.sleep(POLL_SECONDS)


async def is_ready(address: str, tls: ChannelTls | None = None) -> bool:
    """Whether the stage at `address` can serve: grpc://host:port[/service], over TLS if given;
    http://… or https://…"""
    return not await fault(address, tls=tls)


async def fault(*addresses: str, tls: ChannelTls | None = None) -> str:
    """Why a stage cannot serve, from the first of its `addresses` that is not ready; else empty."""
    for address in addresses:
        scheme, _, rest = address.partition("://")
        target, _, service = rest.partition("/")
        is_grpc = scheme == "grpc"
        found = await (_grpc_fault(target, service, tls) if is_grpc else _http_fault(address))
        if found:
            return found
    return ""


async def model_info(
    target: str, key: OwnKey | None = None, tls: ChannelTls | None = None
) -> generator_pb2.GetModelInfoResponse:
    """The model that the generator at `target` (host:port) has loaded; `key` authenticates us."""
    async with open_channel(target, tls=tls) as channel:
        stub = generator_pb2_grpc.GeneratorServiceStub(channel)
        request, metadata = generator_pb2.GetModelInfoRequest(), own_metadata(key)
        return await stub.GetModelInfo(request, timeout=CALL_SECONDS, metadata=metadata)


if __name__ == "__main__":
    sys.exit(not asyncio.run(is_ready(sys.argv[1])))
