"""Health checks by gRPC: each service's state, for any client, however it behaves."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from trivium.wire.serving import GrpcServer

SERVICE = "trivium.chat.v1.ChatService"
PATIENCE_SECONDS = 5.0

State = health_pb2.HealthCheckResponse


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[GrpcServer, int, health_pb2_grpc.HealthStub]]:
    server = GrpcServer([], [SERVICE])
    port = await server.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield server, port, health_pb2_grpc.HealthStub(channel)
    await server.drain(0, 0)


async def test_all_states_are_listed() -> None:
    """One call tells the state of every service, as single checks do."""
    async with serving() as (server, _, stub):
        before = await stub.List(health_pb2.HealthListRequest())
        server.set_serving(True, [SERVICE])
        after = await stub.List(health_pb2.HealthListRequest())

    assert {"": State.NOT_SERVING, SERVICE: State.NOT_SERVING} == states(before)
    assert {"": State.NOT_SERVING, SERVICE: State.SERVING} == states(after)


async def test_each_service_has_a_state_of_its_own() -> None:
    """A server serves nothing until it says so, all services or some."""
    server = GrpcServer([], [SERVICE], health_names=["a model"])
    port = await server.start("127.0.0.1:0")
    found = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for serving, names in ((None, None), (True, None), (False, ["a model"]), (False, None)):
            if serving is not None:
                server.set_serving(serving, names)
            for name in (SERVICE, "a model"):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                found.append(answer.status)
    await server.drain(0, 0)

    up, down = State.SERVING, State.NOT_SERVING
    assert [down, down, up, up, up, down, down, down] == found


async def test_watches_leave_nothing_behind() -> None:
    """Each connection watches anew, so what a watch left behind would add up."""
    async with serving() as (_, _, stub):
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        before = len(asyncio.all_tasks())
        watches = [stub.Watch(request) for _ in range(10)]
        for watch in watches:
            await watch.read()
        during = len(asyncio.all_tasks())
        for watch in watches:
            watch.cancel()
        async with asyncio.timeout(30):
            while len(asyncio.all_tasks()) > before:  # noqa: ASYNC110 - no event for it
                await asyncio.sleep(0.01)

    assert during >= before + 10


async def test_a_watcher_sees_each_change_until_the_drain() -> None:
    """A state, then its changes; the watch ends with the server, and one of a service that is
    unknown says so."""
    async with serving() as (server, _, stub):
        watch = aiter(stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE)))
        unknown = await anext(aiter(stub.Watch(health_pb2.HealthCheckRequest(service="x"))))
        seen = [await anext(watch)]
        server.set_serving(True)
        seen.append(await anext(watch))
        await server.drain(0, 0)
        seen += [state async for state in watch]

    assert State.SERVICE_UNKNOWN == unknown.status
    assert [State.NOT_SERVING, State.SERVING, State.NOT_SERVING] == [one.status for one in seen]


async def test_a_drain_is_reported_in_two_steps() -> None:
    """Checks fail at once; watchers are told only when the port is closed, as their channels would
    otherwise leave without looking for other replicas."""
    request, stop_now = health_pb2.HealthCheckRequest(service=SERVICE), asyncio.Event()
    async with serving() as (server, _, stub):
        server.set_serving(True)
        watch = aiter(stub.Watch(request))
        before = await anext(watch)
        change = asyncio.ensure_future(anext(watch))
        draining = asyncio.create_task(server.drain(3600, 0, stop_now))
        await asyncio.sleep(0)
        checked = await stub.Check(request)
        listed = await stub.List(health_pb2.HealthListRequest())
        is_watcher_told = change.done()
        stop_now.set()
        after = await change
        await draining

    assert {"": State.NOT_SERVING, SERVICE: State.NOT_SERVING} == states(listed)
    assert State.NOT_SERVING == checked.status
    assert not is_watcher_told
    assert [State.SERVING, State.NOT_SERVING] == [before.status, after.status]


async def test_nothing_is_serving_again_after_a_drain() -> None:
    """Although a service may become ready in the middle of it, as when its backend comes back."""
    async with serving() as (server, _, stub):
        server.set_serving(True)
        watch = aiter(stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE)))
        seen = [await anext(watch)]
        draining = asyncio.create_task(server.drain(0, 0))
        while not draining.done():
            server.set_serving(True)
            await asyncio.sleep(0)
        seen += [state async for state in watch]

    assert [State.SERVING, State.NOT_SERVING] == [one.status for one in seen]


async def test_a_watcher_that_reads_nothing_delays_nobody() -> None:
    """Its flow control lets the server send not a single byte; others see every change, and the
    server drains as usual."""
    async with serving() as (server, port, stub):
        _, writer = await unread_watch(port)
        for state in (True, False, True):
            server.set_serving(state)
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))
            assert (State.SERVING if state else State.NOT_SERVING) == answer.status
        await asyncio.wait_for(server.drain(0, 0), PATIENCE_SECONDS)
        writer.close()


async def test_a_check_of_an_unknown_service_is_not_found() -> None:
    """As gRPC's health checking protocol wants it."""
    async with serving() as (_, _, stub):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Check(health_pb2.HealthCheckRequest(service="x"))

    assert grpc.StatusCode.NOT_FOUND is refused.value.code()


def states(listed: health_pb2.HealthListResponse) -> dict[str, int]:
    return {name: one.status for name, one in listed.statuses.items()}


async def unread_watch(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A watch of SERVICE over HTTP/2 with a flow-control window of 0; returns once it runs."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/grpc.health.v1.Health/Watch",
        ":authority": "x",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    block = b"".join(b"\0" + _literal(name) + _literal(text) for name, text in headers.items())
    message = health_pb2.HealthCheckRequest(service=SERVICE).SerializeToString()
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    writer.write(_frame(0x4, 0, 0, b"\0\x04\0\0\0\0"))  # SETTINGS: INITIAL_WINDOW_SIZE is 0
    writer.write(_frame(0x1, 0x4, 1, block))  # HEADERS
    writer.write(_frame(0x0, 0x1, 1, b"\0" + len(message).to_bytes(4) + message))  # DATA
    kind = -1
    while kind != 0x1:  # HEADERS: the call has been accepted
        head = await reader.readexactly(9)
        await reader.readexactly(int.from_bytes(head[:3]))
        kind = head[3]
    return reader, writer


def _literal(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload
