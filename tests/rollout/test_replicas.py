"""What happens to calls when replicas refuse them, are unhealthy, or all fail."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from tests.name_server import NameServer
from tests.ports import free_ports
from tests.tokenizer_svc.scripted_generator import (
    SERVICE,
    Script,
    ScriptedGenerator,
    fails_after,
    finish,
    message_of,
    says,
    stalls_after,
    update,
)
from tokenizer_svc.generator import convert
from tokenizer_svc.generator.client import GeneratorClient
from tokenizer_svc.generator.types import GenerateCommand, TokenUpdate
from tokenizer_svc.request.types import ValidOptions
from trivium.generator.v1 import generator_pb2 as pb
from trivium.generator.v1 import generator_pb2_grpc
from trivium.sampling.v1.sampling_pb2 import SamplingParams
from trivium.wire.channel import open_channel
from trivium.wire.errors import ServiceError, from_rpc_error
from trivium.wire.replicas.metrics import ReplicaCollector
from trivium.wire.replicas.replica import ReplicaState
from trivium.wire.replicas.replica_set import ReplicaSet
from trivium.wire.serving import GrpcServer

END = message_of(update(0, [2]), finish(0, pb.FINISH_REASON_STOP_TOKEN, 1))
ANSWER = convert.updates(END)
DRAINING = ServiceError("draining", "The server is shutting down.")


def command(token_ids: list[int], n: int = 1) -> GenerateCommand:
    """A command for the generator."""
    options = ValidOptions(
        sampling=SamplingParams(),
        max_completion_tokens=None,
        min_tokens=0,
        ignore_eos=False,
        stop=(),
        stop_token_ids=(),
        include_stop=False,
        skip_special_tokens=True,
        n=n,
        top_logprobs=None,
        response_constraint=None,
    )
    return GenerateCommand("ours", token_ids, options, max_new_tokens=5)


class Fleet:
    """Generators, and a client for those that serve the revision "ours".

    `servers` are their servers, in the same order, each on its port of 127.0.0.1.
    """

    def __init__(self, *revisions: str) -> None:
        self.generators = [ScriptedGenerator(revision) for revision in revisions]
        for generator in self.generators:
            generator.script = says([END])
        self.ports = free_ports(len(revisions))
        self.servers: list[GrpcServer] = []
        self.client: GeneratorClient

    @property
    def calls(self) -> list[int]:
        """The number of calls each has had."""
        return [len(generator.calls) for generator in self.generators]

    async def ask(self, prompt_tokens: int = 1, n: int = 1, token: int = 7) -> list[TokenUpdate]:
        """All updates of the answer to a prompt that repeats one token."""
        generation = self.client.generate(command([token] * prompt_tokens, n), None)
        return [update async for updates in generation.messages() for update in updates]

    async def called(self, count: int) -> None:
        """Returns once they have had `count` calls."""
        while sum(self.calls) < count:
            for generator in self.generators:
                generator.called.clear()
            waits = [asyncio.create_task(one.called.wait()) for one in self.generators]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()

    async def known(self, *addresses: str) -> None:
        """Returns once exactly the replicas at these addresses are serving."""
        async for _ in self.client.serving():
            if {str(one.address) for one in self.client.replicas.serving} == set(addresses):
                return


@asynccontextmanager
async def serving(fleet: Fleet) -> AsyncIterator[Fleet]:
    """All of them serve, and those of our revision are known, while the context lasts."""
    for generator, port in zip(fleet.generators, fleet.ports, strict=True):
        server, _ = await generator.serve(port)
        fleet.servers.append(server)
    addresses = [f"127.0.0.1:{port}" for port in fleet.ports]
    fleet.client = GeneratorClient(",".join(addresses), "ours")
    pairs = zip(fleet.generators, addresses, strict=True)
    await fleet.known(*(address for one, address in pairs if one.revision == "ours"))
    yield fleet
    await fleet.client.close()
    for server in fleet.servers:
        await server.drain(0, 0)


@pytest.mark.parametrize("prompt_tokens", [1, 5_000_000])
async def test_a_refused_call_is_retried_on_another_replica(prompt_tokens: int) -> None:
    """A call that was not begun is repeated, even a large one: this one has 5 MB."""
    async with serving(Fleet("ours", "ours")) as fleet:

        async def refuses_first(start: Any, stops: Any) -> AsyncIterator[pb.GenerateResponse]:
            script = says([END]) if sum(fleet.calls) > 1 else fails_after([], DRAINING)
            async for response in script(start, stops):
                yield response

        for generator in fleet.generators:
            generator.script = refuses_first
        answer = await fleet.ask(prompt_tokens)

    assert ANSWER == answer
    assert [1, 1] == fleet.calls


async def test_no_call_is_lost_when_a_drain_begins() -> None:
    """Neither calls in flight nor those that follow, one every half millisecond, are lost, though
    gRPC itself ends some of them as CANCELLED."""
    async with serving(Fleet("ours", "ours")) as fleet:
        asked = []
        for number in range(200):
            asked.append(asyncio.create_task(fleet.ask()))
            if number == 50:
                draining = asyncio.create_task(fleet.servers[0].drain(0, 600))
            await asyncio.sleep(0.0005)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        await asyncio.wait_for(draining, 20)  # not for as long as calls might take

    assert [ANSWER] * 200 == answers


async def test_a_call_that_has_begun_is_not_retried() -> None:
    """The caller would otherwise get the first part twice."""
    async with serving(Fleet("ours", "ours")) as fleet:
        for generator in fleet.generators:
            generator.script = fails_after([message_of(update(0, [70]))], DRAINING)
        with pytest.raises(ServiceError) as broken:
            await fleet.ask()

    assert "draining" == broken.value.code
    assert 1 == sum(fleet.calls)


@pytest.mark.parametrize(
    "error",
    [
        ServiceError("backend_unavailable", "No generator.", everywhere=True),
        ServiceError("invalid_value", "No."),
    ],
    ids=["fails everywhere", "invalid request"],
)
async def test_a_call_that_would_fail_on_any_replica_is_not_retried(error: ServiceError) -> None:
    """If the server says so, or the request is invalid, the error is returned at once."""
    async with serving(Fleet("ours", "ours")) as fleet:
        for generator in fleet.generators:
            generator.script = fails_after([], error)
        with pytest.raises(ServiceError, match=error.message) as refused:
            await fleet.ask()

    assert error.code == refused.value.code
    assert 1 == sum(fleet.calls)


async def test_a_full_replicas_call_is_retried_once() -> None:
    """A call that one replica has no room for is answered by another; if that is full too, the
    caller gets the error, and no further replica is tried."""
    full = ServiceError("queue_full", "The queue is full.", retry_after=7)
    async with serving(Fleet("ours", "ours", "ours")) as fleet:
        fleet.generators[0].script = fails_after([], full)
        answers = [await fleet.ask() for _ in range(3)]
        calls, refusals = sum(fleet.calls), fleet.calls[0]
        for generator in fleet.generators:
            generator.script = fails_after([], full)
        with pytest.raises(ServiceError) as refused:
            await fleet.ask()

    assert [ANSWER] * 3 == answers
    assert 3 + refusals == calls
    assert refusals
    assert ("queue_full", 7) == (refused.value.code, refused.value.retry_after)
    assert calls + 2 == sum(fleet.calls)


@pytest.mark.parametrize(
    "order",
    [
        ("draining", "backend_unavailable"),
        ("backend_unavailable", "draining"),
        ("draining", "draining"),
        ("queue_full", "backend_unavailable"),
        ("backend_unavailable", "queue_full"),
    ],
)
async def test_a_refusal_does_not_use_up_the_retry_of_a_lost_call(order: tuple[str, str]) -> None:
    """While one replica drains or is full, another may die: the third one answers."""
    async with serving(Fleet("ours", "ours", "ours")) as fleet:

        async def script(start: Any, stops: Any) -> AsyncIterator[pb.GenerateResponse]:
            if sum(fleet.calls) <= len(order):
                raise ServiceError(order[sum(fleet.calls) - 1], "Gone.")
            yield END

        for generator in fleet.generators:
            generator.script = script
        answer = await fleet.ask()

    assert ANSWER == answer
    assert [1, 1, 1] == fleet.calls


async def test_a_call_that_all_replicas_refuse_ends() -> None:
    """If all say that they are draining but stay in the list, the call is not sent for ever."""
    async with serving(Fleet("ours", "ours", "ours")) as fleet:
        for generator in fleet.generators:
            generator.script = fails_after([], DRAINING)
        with pytest.raises(ServiceError, match=DRAINING.message):
            await fleet.ask()

    assert 4 == sum(fleet.calls)  # one is tried once more, after a pause


async def test_a_refused_prompt_does_not_count_as_cached() -> None:
    """The next turn goes to the one that answered, even if the other has room again."""
    async with serving(Fleet("ours", "ours")) as fleet:
        fleet.generators[0].script = fails_after([], ServiceError("queue_full", "Full."))
        for conversation in range(16):
            await fleet.ask(100, token=conversation)
        refused = fleet.calls[0]
        fleet.generators[0].script = says([END])
        for conversation in range(16):
            await fleet.ask(200, token=conversation)

    assert refused
    assert [refused, 32] == fleet.calls


class Full(ScriptedGenerator):
    """Reports that no slot is free."""

    async def WatchLoad(
        self, request: pb.WatchLoadRequest, context: Any
    ) -> AsyncIterator[pb.WatchLoadResponse]:
        yield pb.WatchLoadResponse(running_sequences=8)
        await asyncio.Event().wait()


async def test_a_generator_that_reports_no_free_slot_gets_no_calls() -> None:
    """Even conversations that it has cached go elsewhere once its load is known."""
    fleet = Fleet("ours", "ours")
    fleet.generators[0] = Full("ours")
    fleet.generators[0].script = says([END])
    async with serving(fleet), asyncio.timeout(10):
        before = None
        while before != fleet.calls[0]:
            before = fleet.calls[0]
            for conversation in range(16):
                await fleet.ask(100, token=conversation)

    assert fleet.calls[1] >= 16


@pytest.mark.parametrize("instance_id", ["first", "second"])
async def test_a_restarted_replica_has_nothing_cached(instance_id: str) -> None:
    """After a restart its conversations may move; after a lost connection they stay."""
    async with serving(Fleet("ours", "ours")) as fleet:
        fleet.generators[0].script = fails_after([], ServiceError("queue_full", "Full."))
        for conversation in range(32):
            await fleet.ask(100, token=conversation)
        before = fleet.calls
        fleet.generators[0].script = says([END])
        again = fleet.generators[1]
        await fleet.servers[1].drain(0, 0)
        await fleet.known(f"127.0.0.1:{fleet.ports[0]}")
        again.instance_id = instance_id
        again.watched.clear()
        fleet.servers[1], _ = await again.serve(fleet.ports[1])
        await fleet.known(*(f"127.0.0.1:{port}" for port in fleet.ports))
        await again.watched.wait()
        for conversation in range(32):
            await fleet.ask(200, token=conversation)
        elsewhere, there = (now - then for now, then in zip(fleet.calls, before, strict=True))

    assert 32 == elsewhere + there
    assert (elsewhere > 0) is (instance_id == "second")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("queue_full", "queue_full"),
        ("draining", "draining"),
        ("backend_unavailable", "backend_unavailable"),
        ("client_closed_request", "backend_unavailable"),
    ],
)
async def test_retries_are_counted_by_reason(code: str, reason: str) -> None:
    """Retries are counted by the reason of the failure before; all reasons exist from the start,
    and calls answered at once do not count."""
    async with serving(Fleet("ours", "ours")) as fleet:
        registry = CollectorRegistry()
        registry.register(ReplicaCollector({"tiny": fleet.client.replicas.status}))
        before = retries(registry)
        await fleet.ask()

        async def fails_once(start: Any, stops: Any) -> AsyncIterator[pb.GenerateResponse]:
            if sum(fleet.calls) == 2:
                raise ServiceError(code, "No.")
            yield END

        for generator in fleet.generators:
            generator.script = fails_once
        await fleet.ask()
        after = retries(registry)

    reasons = {"queue_full", "draining", "backend_unavailable", "model_loading", "invalid_api_key"}
    assert dict.fromkeys(reasons, 0.0) == before
    assert before | {reason: 1.0} == after


def retries(registry: CollectorRegistry) -> dict[str, float]:
    """Retried calls by reason."""
    return {
        sample.labels["reason"]: sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "trivium_replica_retries_total"
    }


async def test_a_request_kills_at_most_two_replicas() -> None:
    """A request that kills a replica kills at most one other: callers are told not to retry it."""
    async with serving(Fleet("ours", "ours", "ours")) as fleet:
        for generator in fleet.generators:
            generator.script = fails_after([], ServiceError("backend_unavailable", "Gone."))
        with pytest.raises(ServiceError, match="Gone") as lost:
            await fleet.ask()

    assert lost.value.everywhere
    assert [0, 1, 1] == sorted(fleet.calls)


@pytest.mark.parametrize("code", ["internal_error", "backend_unavailable"])
async def test_a_failing_replica_is_ejected(code: str) -> None:
    """It reports that it is healthy, and is always free because it fails at once; after three
    failures others get its calls, except for an occasional one. Once it answers again, it gets its
    share."""
    async with serving(Fleet("ours", "ours")) as fleet:
        registry = CollectorRegistry()
        registry.register(ReplicaCollector({"tiny": fleet.client.replicas.status}))
        fleet.generators[0].script = fails_after([], ServiceError(code, "No."))
        asked = [await asyncio.gather(fleet.ask(), return_exceptions=True) for _ in range(100)]
        failing = fleet.calls[0]
        ejected = registry.get_sample_value("trivium_replica_ejections_total", labels(fleet, 0))
        fleet.generators[0].script = says([END])
        while fleet.calls[0] < failing + 10:
            asked.append([await fleet.ask()])
        again = registry.get_sample_value("trivium_replica_ejections_total", labels(fleet, 0))

    lost = failing if code == "internal_error" else 0  # lost calls are retried
    assert len(asked) - lost == asked.count([ANSWER])
    assert 3 <= failing < 10
    assert ejected == again == failing - 2
    assert 0 == registry.get_sample_value("trivium_replica_ejections_total", labels(fleet, 1))


async def test_if_all_replicas_fail_none_is_ejected() -> None:
    """Ejection never leaves no replica: callers get the actual error, from either."""
    async with serving(Fleet("ours", "ours")) as fleet:
        for generator in fleet.generators:
            generator.script = fails_after([], ServiceError("internal_error", "No."))
        for _ in range(20):
            with pytest.raises(ServiceError) as failed:
                await fleet.ask()
            assert "internal_error" == failed.value.code
        calls = fleet.calls

    assert 20 == sum(calls)
    assert min(calls) > 3


def labels(fleet: Fleet, number: int) -> dict[str, str]:
    """The labels of one replica's metrics."""
    return {"model_name": "tiny", "replica": f"127.0.0.1:{fleet.ports[number]}"}


async def test_a_request_that_always_fails_ejects_no_replica() -> None:
    """Others are answered in between, and all replicas keep taking turns."""
    poison = ServiceError("internal_error", "No.")

    async def script(start: Any, stops: Any) -> AsyncIterator[pb.GenerateResponse]:
        if start.prompt_token_ids[0] == 66:
            raise poison
        yield END

    async with serving(Fleet("ours", "ours")) as fleet:
        for generator in fleet.generators:
            generator.script = script
        for _ in range(10):
            with pytest.raises(ServiceError):
                await fleet.ask(token=66)
            for _ in range(3):
                await fleet.ask()

    assert [20, 20] == fleet.calls


async def test_a_full_replica_without_others_is_not_retried() -> None:
    """It would be full the second time too."""
    async with serving(Fleet("ours")) as fleet:
        fleet.generators[0].script = fails_after([], ServiceError("queue_full", "Full."))
        with pytest.raises(ServiceError, match="Full"):
            await fleet.ask()

    assert [1] == fleet.calls


async def test_only_replicas_of_the_revision_are_called() -> None:
    """Replicas of another revision get no calls, though they are up and healthy."""
    async with serving(Fleet("theirs", "ours", "theirs")) as fleet:
        for _ in range(6):
            await fleet.ask()

    assert [0, 6, 0] == fleet.calls


async def test_calls_go_to_the_least_outstanding_replica() -> None:
    """Calls are spread evenly over busy replicas; the next ones go to the one that has finished."""
    events = [asyncio.Event(), asyncio.Event()]

    def until(event: asyncio.Event) -> Script:
        async def script(start: Any, stops: Any) -> AsyncIterator[pb.GenerateResponse]:
            await event.wait()
            yield END

        return script

    async with serving(Fleet("ours", "ours")) as fleet:
        for generator, event in zip(fleet.generators, events, strict=True):
            generator.script = until(event)
        first = [asyncio.create_task(fleet.ask()) for _ in range(6)]
        await fleet.called(6)
        spread = fleet.calls
        events[0].set()
        while sum(task.done() for task in first) < 3:
            await asyncio.wait(
                [task for task in first if not task.done()], return_when=asyncio.FIRST_COMPLETED
            )
        for _ in range(4):
            await fleet.ask()
        events[1].set()
        await asyncio.gather(*first)

    assert [3, 3] == spread
    assert [7, 3] == fleet.calls


async def test_address_changes_are_followed() -> None:
    """A new address of a name gets calls; a removed one gets no more, and its running calls
    continue. A name that suddenly has no address changes nothing."""
    fleet, resumed = Fleet("ours", "ours"), asyncio.Event()

    async def waits(start: Any, stops: Any) -> AsyncIterator[pb.GenerateResponse]:
        await resumed.wait()
        yield END

    fleet.generators[0].script = waits
    port, hosts = fleet.ports[0], ("127.0.0.2", "127.0.0.3")
    for generator, host in zip(fleet.generators, hosts, strict=True):
        fleet.servers.append((await generator.serve(port, host))[0])
    with NameServer(**{"generator.test": hosts[:1]}) as names:
        fleet.client = GeneratorClient(names.target("generator.test", port), "ours")
        running = asyncio.create_task(fleet.ask())
        await fleet.generators[0].called.wait()
        await names.change("generator.test", hosts[1])
        await fleet.known(f"{hosts[1]}:{port}")
        answers = [await fleet.ask() for _ in range(4)]
        await names.change("generator.test")
        answers.append(await fleet.ask())
        resumed.set()
        answers.append(await running)
        await fleet.client.close()
    for server in fleet.servers:
        await server.drain(0, 0)

    assert [ANSWER] * 6 == answers
    assert [1, 5] == fleet.calls


async def test_a_removed_replica_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left of it once its calls have ended, not even the health watch."""
    monkeypatch.setattr("trivium.wire.replicas.replica_set._RESOLVE_SECONDS", 0.05)
    server, closed = GrpcServer([], [SERVICE]), asyncio.Event()
    behind = await server.start("127.0.0.1:0")
    server.set_serving(True)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", behind)
        await asyncio.gather(copy(reader, to_server), copy(from_server, writer))
        closed.set()

    forwarder = await asyncio.start_server(forward, "127.0.0.2", 0)
    port = forwarder.sockets[0].getsockname()[1]
    with NameServer(**{"x.test": ["127.0.0.2"]}) as names:
        replicas = ReplicaSet(names.target("x.test", port), SERVICE)
        async for is_serving in replicas.changes():
            if is_serving:
                break
        await names.change("x.test", "127.0.0.3")
        async with asyncio.timeout(30):
            await closed.wait()
        left = [str(replica.address) for replica in replicas.replicas]
        await replicas.close()
    forwarder.close()
    await server.drain(0, 0)

    assert [f"127.0.0.3:{port}"] == left


async def test_an_unresolved_name_does_not_delay_the_others() -> None:
    """In a list of names, the addresses of one are used before the lookup of another times out,
    which takes a second attempt."""
    with NameServer(b=["127.0.0.2"]) as names:
        names.unanswered["a"] = 0
        replicas = ReplicaSet(",".join([names.target("a", 5), names.target("b", 5)]), SERVICE)
        questions = 0
        while not (replicas.replicas and questions):
            await asyncio.sleep(0.01)
            questions = names.unanswered["a"]
        await replicas.close()

    assert questions <= 2  # one each for IPv4 and IPv6


async def test_a_new_replica_is_not_flooded() -> None:
    """It does not get all calls until it has caught up with the others."""
    fleet = Fleet("ours", "ours")
    port, hosts = fleet.ports[0], ("127.0.0.2", "127.0.0.3")
    for generator, host in zip(fleet.generators, hosts, strict=True):
        fleet.servers.append((await generator.serve(port, host))[0])
    with NameServer(**{"generator.test": hosts[:1]}) as names:
        fleet.client = GeneratorClient(names.target("generator.test", port), "ours")
        for _ in range(20):
            await fleet.client.info()
        names.names["generator.test"] = hosts
        await fleet.known(*(f"{host}:{port}" for host in hosts))
        for _ in range(10):
            await fleet.client.info()
        picked = {one.address: one.picked for one in fleet.client.replicas.status().replicas}
        await fleet.client.close()
    for server in fleet.servers:
        await server.drain(0, 0)

    assert {f"{hosts[0]}:{port}": 25, f"{hosts[1]}:{port}": 5} == picked


class BriefHealth(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Ends each watch after reporting SERVING; counts the watches."""

    def __init__(self) -> None:
        self.watches = 0

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.watches += 1
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


async def test_lost_replicas_are_logged_but_not_reconnects(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Renewing an old connection is not logged; losing a replica is."""
    caplog.set_level(logging.INFO, "trivium.wire.replicas")
    server = GrpcServer([], [SERVICE], max_connection_age_seconds=0.3)
    port = await server.start("127.0.0.1:0")
    server.set_serving(True)
    replicas = ReplicaSet(f"127.0.0.1:{port}", SERVICE)
    connections = 0
    async for _ in replicas.changes():
        connections += bool(replicas.serving)
        if connections == 3:
            break
    renewed = [record.getMessage() for record in caplog.records]
    await server.drain(0, 0)
    for _ in range(600):
        if "unreachable" in caplog.text:
            break
        await asyncio.sleep(0.1)
    await replicas.close()

    assert [f"replica 127.0.0.1:{port} is serving"] == renewed
    assert f"replica 127.0.0.1:{port} is unreachable" == caplog.records[-1].getMessage()


async def test_a_health_watch_that_ends_is_restarted() -> None:
    """A proxy may do that: the watch is restarted after a pause, and the replica serves."""
    server, health = grpc.aio.server(), BriefHealth()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    replicas = ReplicaSet(f"127.0.0.1:{port}", SERVICE)
    serving = set()
    began = asyncio.get_running_loop().time()
    while health.watches < 3:
        serving.add(len(replicas.serving))
        await asyncio.sleep(0)
    seconds = asyncio.get_running_loop().time() - began
    states = [replica.state for replica in replicas.replicas]
    await replicas.close()
    await server.stop(None)

    assert [ReplicaState.SERVING] == states
    assert {0, 1} == serving
    assert seconds > 0.2


async def test_a_drain_as_callers_see_it() -> None:
    """Polling sees the drain at once; watches and calls see nothing until the notice period is
    over; then running calls continue, and new calls and watches are refused."""
    resumed = asyncio.Event()

    async def script(start: Any, stops: Any) -> AsyncIterator[pb.GenerateResponse]:
        await resumed.wait()
        yield END

    async with (
        serving(Fleet("ours")) as fleet,
        open_channel(f"127.0.0.1:{fleet.ports[0]}") as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        watch = health.Watch(request)
        stop_now = asyncio.Event()
        async with aclosing(_statuses(watch)) as watched:
            before = await anext(watched)
            draining = asyncio.create_task(fleet.servers[0].drain(2.0, 30, stop_now))
            while (polled := (await health.Check(request)).status) == before:
                pass
            served = await fleet.ask()
            fleet.generators[0].script = script
            running = asyncio.create_task(fleet.ask())
            after = [state async for state in watched]
        stub: Any = generator_pb2_grpc.GeneratorServiceStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetModelInfo(pb.GetModelInfoRequest())
        resumed.set()
        finished = await running
        await draining

    states = health_pb2.HealthCheckResponse
    assert (states.SERVING, states.NOT_SERVING) == (before, polled)
    assert [states.NOT_SERVING] == after
    assert ANSWER == served == finished
    # CANCELLED if it crossed the GOAWAY.
    assert refused.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


async def test_a_stream_reset_by_a_proxy_counts_as_lost() -> None:
    """A proxy that loses its server resets streams with INTERNAL_ERROR; an internal error of ours
    would differ only in its details."""
    headers, reset, settings, ack = 1, 3, 4, 1
    ended = asyncio.Event()

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def send(kind: int, flags: int, stream: bytes, payload: bytes) -> None:
            writer.write(len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream + payload)

        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"SM\r\n\r\n")
            send(settings, 0, bytes(4), b"")
            frame = bytes(9)
            while frame[3] != headers:
                frame = await reader.readexactly(9)
                await reader.readexactly(int.from_bytes(frame[:3], "big"))
                if frame[3] == settings and not frame[4] & ack:
                    send(settings, ack, bytes(4), b"")
            send(reset, 0, frame[5:], (2).to_bytes(4, "big"))
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        ended.set()

    async with await asyncio.start_server(proxy, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with open_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = generator_pb2_grpc.GeneratorServiceStub(channel)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.aio.AioRpcError) as lost:
                await stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=60)
        await ended.wait()

    assert grpc.StatusCode.INTERNAL == lost.value.code()
    assert "backend_unavailable" == from_rpc_error(lost.value).code


async def test_a_drain_can_be_cut_short() -> None:
    """Running calls end as draining, whatever notice and drain time are set."""
    async with serving(Fleet("ours")) as fleet:
        fleet.generators[0].script = stalls_after([END])
        messages = fleet.client.generate(command([7]), None).messages()
        await anext(messages)
        stop_now = asyncio.Event()
        draining = asyncio.create_task(fleet.servers[0].drain(600, 600, stop_now))
        stop_now.set()
        with pytest.raises(ServiceError) as cut:
            await anext(messages)
        await draining

    assert "draining" == cut.value.code


async def test_a_slow_reader_gets_the_draining_error() -> None:
    """When the drain ends, a call that waits for its reader ends with a status as others do."""
    generator = ScriptedGenerator("ours")
    generator.script = says([message_of(update(0, [70] * 100_000))] * 100)
    server, port = await generator.serve()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        call = generator_pb2_grpc.GeneratorServiceStub(channel).Generate()
        await call.write(convert.start_command(command([7])))
        await call.read()
        draining = asyncio.create_task(server.drain(0, 0.1))
        await asyncio.sleep(0.2)
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            while await call.read() is not grpc.aio.EOF:
                pass
        await draining

    assert "draining" == from_rpc_error(cut.value).code


async def test_the_documented_service_config_loses_no_call() -> None:
    """With the service config in docs/operations.md gRPC itself retries: while one of two replicas
    drains, no call of a plain gRPC client fails."""
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    config = json.loads(page.partition("```json\n")[2].partition("```")[0])
    config["healthCheckConfig"]["serviceName"] = SERVICE
    options = [("grpc.service_config", json.dumps(config))]
    async with serving(Fleet("ours", "ours")) as fleet:
        target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in fleet.ports)
        async with grpc.aio.insecure_channel(target, options=options) as channel:
            stub: Any = generator_pb2_grpc.GeneratorServiceStub(channel)  # type: ignore[no-untyped-call]

            async def ask() -> list[pb.GenerateResponse]:
                call = stub.Generate()
                await call.write(pb.GenerateRequest())
                return [response async for response in call]

            while not all(fleet.calls):
                await ask()
            asked = []
            for number in range(200):
                asked.append(asyncio.create_task(ask()))
                if number == 50:
                    draining = asyncio.create_task(fleet.servers[0].drain(0, 5))
                await asyncio.sleep(0.0005)
            answers = await asyncio.gather(*asked, return_exceptions=True)
            await draining

    assert [[END]] * 200 == answers


async def _statuses(watch: Any) -> AsyncIterator[int]:
    async for response in watch:
        yield response.status
