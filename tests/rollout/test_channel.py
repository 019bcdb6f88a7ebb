"""What a channel does with replicas that refuse, that are not healthy, or that all fail alike."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.tokenizer_svc.scripted_generator import (
    SERVICE,
    ScriptedGenerator,
    code_of,
    fails_after,
    finish,
    message_of,
    says,
    stalls_after,
    update,
)
from trivium.cli.pipeline import free_ports
from trivium.generator.v1 import generator_pb2 as pb
from trivium.generator.v1 import generator_pb2_grpc
from trivium.wire.channel import open_channel, revision_service
from trivium.wire.errors import ServiceError
from trivium.wire.serving import GrpcServer

END = message_of(update(0, [2]), finish(0, pb.FINISH_REASON_STOP_TOKEN, 1))
DRAINING = ServiceError("draining", "The server is shutting down.")


class Pair:
    """Two generators behind one channel. `servers` are theirs, in the same order."""

    def __init__(self, *revisions: str) -> None:
        self.generators = [ScriptedGenerator(revision) for revision in revisions]
        for generator in self.generators:
            generator.script = says([END])
        self.servers: list[GrpcServer] = []
        self.channel: grpc.aio.Channel

    @property
    def calls(self) -> list[int]:
        """How many calls each of them had."""
        return [len(generator.calls) for generator in self.generators]

    async def ask(self, prompt_tokens: int = 1) -> list[pb.GenerateResponse]:
        call = generator_pb2_grpc.GeneratorServiceStub(self.channel).Generate()  # type: ignore[no-untyped-call]
        start = pb.StartGeneration(prompt_token_ids=[1_000_000] * prompt_tokens)
        await call.write(pb.GenerateRequest(start=start))
        return [response async for response in call]


@asynccontextmanager
async def serving(pair: Pair) -> AsyncIterator[Pair]:
    ports = free_ports(len(pair.generators))
    for generator, port in zip(pair.generators, ports, strict=True):
        server, _ = await generator.serve(port)
        pair.servers.append(server)
    target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
    async with open_channel(target, revision_service(SERVICE, "ours")) as pair.channel:
        yield pair
    for server in pair.servers:
        await server.drain(0, 0)


@pytest.mark.parametrize("prompt_tokens", [1, 5_000_000])
async def test_what_one_refuses_another_answers(prompt_tokens: int) -> None:
    """A call that was not begun is repeated, the largest ones too: this one has 20 MB."""
    async with serving(Pair("ours", "ours")) as pair:
        pair.generators[0].script = fails_after([], DRAINING)
        while not pair.calls[0]:  # until it is connected too, its turn does not come
            assert [END] == await pair.ask(prompt_tokens)

    assert pair.calls[1] >= 1


async def test_no_call_is_lost_when_a_drain_begins() -> None:
    """Neither those that are on their way then, nor those that follow, one every half a
    millisecond: gRPC itself ends some of them as CANCELLED."""
    async with serving(Pair("ours", "ours")) as pair:
        while not all(pair.calls):
            await pair.ask()
        asked = []
        for number in range(200):
            asked.append(asyncio.create_task(pair.ask()))
            if number == 50:
                draining = asyncio.create_task(pair.servers[0].drain(0, 5))
            await asyncio.sleep(0.0005)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        await draining

    assert [[END]] * 200 == answers


async def test_what_was_begun_is_not_repeated() -> None:
    """The caller would get its first part twice."""
    async with serving(Pair("ours", "ours")) as pair:
        for generator in pair.generators:
            generator.script = fails_after([message_of(update(0, [70]))], DRAINING)
        with pytest.raises(grpc.aio.AioRpcError) as broken:
            await pair.ask()

    assert ("draining", None) == code_of(broken.value)
    assert 1 == sum(pair.calls)


async def test_what_would_fail_everywhere_is_not_repeated() -> None:
    """The server says so, and its word arrives at once."""
    async with serving(Pair("ours", "ours")) as pair:
        everywhere = ServiceError("backend_unavailable", "No generator.", everywhere=True)
        for generator in pair.generators:
            generator.script = fails_after([], everywhere)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await pair.ask()

    assert ("backend_unavailable", None) == code_of(refused.value)
    assert 1 == sum(pair.calls)


async def test_only_replicas_of_the_revision_are_called() -> None:
    """Those of another one are up and healthy, and get nothing."""
    async with serving(Pair("theirs", "ours", "theirs")) as pair:
        for _ in range(6):
            await pair.ask()

    assert [0, 6, 0] == pair.calls


async def test_a_drain_as_callers_see_it() -> None:
    """Who polls hears of it at once; who watches, and all calls, notice nothing before the time
    of notice is over; then calls that run go on and new ones find nobody here."""
    resumed = asyncio.Event()

    async def script(start: Any, stops: Any) -> AsyncIterator[pb.GenerateResponse]:
        await resumed.wait()
        yield END

    async with serving(Pair("ours")) as pair:
        health = health_pb2_grpc.HealthStub(pair.channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        watch = health.Watch(request)
        hurry = asyncio.Event()
        async with aclosing(_statuses(watch)) as watched:
            before = await anext(watched)
            draining = asyncio.create_task(pair.servers[0].drain(2.0, 30, hurry))
            while (polled := (await health.Check(request)).status) == before:
                pass
            served = await pair.ask()
            pair.generators[0].script = script
            running = asyncio.create_task(pair.ask())
            after = await anext(watched)
        stub: Any = generator_pb2_grpc.GeneratorServiceStub(pair.channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetModelInfo(pb.GetModelInfoRequest())
        resumed.set()
        finished = await running
        await draining

    states = health_pb2.HealthCheckResponse
    assert (states.SERVING, states.NOT_SERVING, states.NOT_SERVING) == (before, polled, after)
    assert [END] == served == finished
    assert grpc.StatusCode.UNAVAILABLE is refused.value.code()


async def test_the_end_of_a_drain_can_be_hurried() -> None:
    """What still runs ends as draining, whatever notice and time were promised."""
    async with serving(Pair("ours")) as pair:
        pair.generators[0].script = stalls_after([END])
        call = generator_pb2_grpc.GeneratorServiceStub(pair.channel).Generate()  # type: ignore[no-untyped-call]
        await call.write(pb.GenerateRequest(start=pb.StartGeneration()))
        await call.read()
        hurry = asyncio.Event()
        draining = asyncio.create_task(pair.servers[0].drain(600, 600, hurry))
        hurry.set()
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await call.read()
        await draining

    assert ("draining", None) == code_of(cut.value)


async def _statuses(watch: Any) -> AsyncIterator[int]:
    async for response in watch:
        yield response.status
