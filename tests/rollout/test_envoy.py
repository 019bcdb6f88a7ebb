"""deploy/envoy in the real Envoy: an edge in front of the facades, and a proxy between stages.

A request goes through both: edge, facade, proxy, tokenizer, proxy, generator.
"""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.node import executable
from tests.ports import free_ports
from tests.rollout.fleet import FACADE, GENERATOR, TOKENIZER, Fleet
from tests.rollout.load import Load, loaded
from tests.rollout.proxy import endpoint, envoy
from tests.tiny_models import tiny_model_directory
from trivium.chat.v1 import chat_pb2, chat_pb2_grpc
from trivium.cli.probe import is_ready
from trivium.wire.channel import open_channel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux", reason="127.0.0.2 is a loopback address by default only on Linux"
    ),
]

A, B = "127.0.0.2", "127.0.0.3"
URL = "/v1/chat/completions"


class Mesh:
    """Two replicas of each stage at A and B, and both proxies."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.rest, self.grpc, self.tokenizers, self.generators = free_ports(4)
        self.url = f"http://127.0.0.1:{self.rest}"

    @contextlib.contextmanager
    def proxies(self, folder: Path) -> Iterator[None]:
        """Runs both proxies while the context lasts."""
        ports = self.fleet.ports
        edge = {
            endpoint("0.0.0.0", 8080): endpoint("127.0.0.1", self.rest),
            endpoint("0.0.0.0", 8081): endpoint("127.0.0.1", self.grpc),
            endpoint("rest_facade", 8000): endpoint(f"{FACADE}.test", ports.facade),
            endpoint("tokenizer_svc", 50051): endpoint(f"{TOKENIZER}.test", ports.tokenizer),
        }
        stages = {
            endpoint("0.0.0.0", 50051): endpoint("127.0.0.1", self.tokenizers),
            endpoint("0.0.0.0", 50052): endpoint("127.0.0.1", self.generators),
            endpoint("tokenizer_svc", 50051): endpoint(f"{TOKENIZER}.test", ports.tokenizer),
            endpoint("generator_svc", 50052): endpoint(f"{GENERATOR}.test", ports.generator),
        }
        names = self.fleet.names
        with envoy("edge.yaml", names, folder, edge), envoy("stages.yaml", names, folder, stages):
            yield

    async def start(self, stage: str, host: str) -> None:
        """Starts a replica that calls the next stage through the proxy and is already in DNS."""
        targets = {
            GENERATOR: {},
            TOKENIZER: {"TRIVIUM_TOKENIZER_GENERATOR_TARGET": f"127.0.0.1:{self.generators}"},
            FACADE: {"TRIVIUM_FACADE_TOKENIZER_TARGET": f"127.0.0.1:{self.tokenizers}"},
        }
        await self.fleet.start(stage, host, **targets[stage])

    async def until_ready(self) -> None:
        """Returns once requests through both proxies succeed."""
        async with asyncio.timeout(120):
            while not await is_ready(f"{self.url}/health"):
                pass

    def body(self, **more: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": "Once upon a time"}]
        return {"model": self.fleet.model.name, "messages": messages, "temperature": 0, **more}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("fleet")
    with Fleet(tiny_model_directory(), folder) as fleet:
        mesh = Mesh(fleet)
        with mesh.proxies(folder):
            yield mesh


@pytest.fixture
async def mesh(started: Mesh) -> Mesh:
    """All replicas run and are ready."""
    for stage in (GENERATOR, TOKENIZER, FACADE):
        started.fleet.publish(stage, A, B)
        for host in (A, B):
            if (stage, host) not in started.fleet.processes:
                await started.start(stage, host)
    await started.until_ready()
    return started


@pytest.fixture
async def client(mesh: Mesh) -> AsyncIterator[httpx.AsyncClient]:
    """A client for the edge."""
    async with httpx.AsyncClient(base_url=mesh.url, trust_env=False, timeout=120) as client:
        yield client


async def busy(mesh: Mesh, load: Load, stage: str, host: str) -> None:
    """Returns once this replica gets a share of the load."""
    before = await mesh.fleet.tokens(stage, host)
    async with asyncio.timeout(60):
        while await mesh.fleet.tokens(stage, host) == before:
            await load.more(1)


def content(sse: str) -> str:
    """The text of a stream that completed."""
    *events, end = sse.removesuffix("\n\n").split("\n\n")
    assert "data: [DONE]" == end
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


HTTP2 = """
const [url, path, body] = process.argv.slice(1);
const client = require("node:http2").connect(url);
const call = client.request({":method": "POST", ":path": path, "content-type": "application/json"});
call.setEncoding("utf8");
call.on("data", (part) => process.stdout.write(part));
call.on("end", () => client.close());
call.end(body);
"""


async def test_every_protocol_gives_the_same_answer(mesh: Mesh, client: httpx.AsyncClient) -> None:
    """The answer is the same, streaming or not, over HTTP/1.1, HTTP/2 and gRPC."""
    body = mesh.body(max_tokens=20)
    whole = await client.post(URL, json=body)
    streamed = await client.post(URL, json={**body, "stream": True})
    command = [executable(), "-e", HTTP2, mesh.url, URL, json.dumps(body)]
    http2 = await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    async with open_channel(f"127.0.0.1:{mesh.grpc}") as channel:
        stub: Any = chat_pb2_grpc.ChatServiceStub(channel)
        request = chat_pb2.CreateChatCompletionRequest(
            model=body["model"],
            messages=[{"role": "ROLE_USER", "content": [{"text": "Once upon a time"}]}],
            options={"max_completion_tokens": 20, "sampling": {"temperature": 0}},
        )
        events = [event async for event in stub.StreamChatCompletion(request, timeout=60)]

    expected = whole.json()["choices"][0]["message"]["content"]
    assert expected
    assert expected == content(streamed.text)
    assert expected == json.loads(http2.stdout)["choices"][0]["message"]["content"]
    assert expected == "".join(event.delta.content for event in events)


async def test_events_are_not_buffered(mesh: Mesh, client: httpx.AsyncClient) -> None:
    """The first tokens arrive while others are generated; a disconnecting client ends the work."""
    body = mesh.body(max_tokens=1900, n=24, ignore_eos=True, stream=True)
    async with client.stream("POST", URL, json=body) as answer:
        parts = answer.aiter_text()
        text = await anext(parts)
        while '"content":"' not in text.replace('"content":""', ""):
            text += await anext(parts)
        running = await running_sequences(mesh)
    async with asyncio.timeout(60):
        while await running_sequences(mesh):
            pass

    assert 24 == running
    assert "[DONE]" not in text


async def running_sequences(mesh: Mesh) -> float:
    """The running sequences of both generators."""
    found = 0.0
    async with httpx.AsyncClient(trust_env=False) as client:
        for host in (A, B):
            url = f"http://{host}:{mesh.fleet.ports.generator_metrics}/metrics"
            for line in (await client.get(url)).text.splitlines():
                if line.startswith("vllm:num_requests_running"):
                    found += float(line.split()[-1])
    return found


@pytest.mark.parametrize("stage", [GENERATOR, TOKENIZER])
async def test_a_replica_drains_during_a_long_stream(mesh: Mesh, stage: str) -> None:
    """Its last stream continues; all else goes to the other replica, even from callers whose only
    health watch was on the draining one."""
    fleet = mesh.fleet
    fleet.publish(stage, A)
    await fleet.kill(stage, B)
    await mesh.until_ready()
    async with httpx.AsyncClient(base_url=mesh.url, trust_env=False, timeout=120) as client:
        body = mesh.body(max_tokens=1900, n=24, ignore_eos=True, stream=True)
        async with client.stream("POST", URL, json=body) as answer:
            parts = answer.aiter_text()
            text = await anext(parts)
            await mesh.start(stage, B)
            fleet.publish(stage, A, B)
            async with loaded(fleet.model.name, [mesh.url]) as load:
                await busy(mesh, load, stage, B)
                fleet.signal(stage, A, signal.SIGTERM)
                await asyncio.sleep(2)  # its notice period
                await load.more(20)
                was_running = fleet.processes[stage, A].poll() is None
            text += await anext(parts)
    status = await fleet.ended(stage, A)

    assert [] == load.faults
    assert {"ready"} == set(load.balancer.health[mesh.url])
    assert was_running
    assert "error" not in text
    assert 0 == status


@pytest.mark.parametrize("stage", [GENERATOR, TOKENIZER, FACADE])
async def test_one_of_two_is_drained(mesh: Mesh, stage: str) -> None:
    """No request fails, whichever stage is drained."""
    async with loaded(mesh.fleet.model.name, [mesh.url]) as load:
        await load.more(10)
        mesh.fleet.signal(stage, A, signal.SIGTERM)
        status = await mesh.fleet.ended(stage, A)
        await load.more(30)

    assert [] == load.faults
    assert {"ready"} == set(load.balancer.health[mesh.url])
    assert 0 == status


@pytest.mark.parametrize("stage", [GENERATOR, TOKENIZER, FACADE])
async def test_one_of_two_is_killed(mesh: Mesh, stage: str) -> None:
    """kill -9 ends running streams and nothing else, even while DNS still has the replica."""
    async with loaded(mesh.fleet.model.name, [mesh.url]) as load:
        await load.more(10)
        await mesh.fleet.kill(stage, A)
        await load.more(30)

    assert [] == [fault for fault in load.faults if not fault.begun]
    assert len(load.faults) <= load.streams


@pytest.mark.parametrize("stage", [GENERATOR, TOKENIZER])
async def test_one_of_two_is_frozen(mesh: Mesh, stage: str) -> None:
    """Calls that it had not begun to answer are retried on the other one; later calls go there."""
    async with loaded(mesh.fleet.model.name, [mesh.url]) as load:
        await load.more(10)
        mesh.fleet.signal(stage, A, signal.SIGSTOP)
        try:
            await load.more(40)
        finally:
            mesh.fleet.signal(stage, A, signal.SIGCONT)
    assert [] == [fault for fault in load.faults if not fault.begun]
    assert len(load.faults) <= load.streams


async def test_a_frozen_facade_gets_no_new_requests(mesh: Mesh) -> None:
    """Once its health check has failed it gets no new requests; it keeps those it has."""
    mesh.fleet.signal(FACADE, A, signal.SIGSTOP)
    try:
        await asyncio.sleep(6)  # twice a check's interval and timeout
        async with loaded(mesh.fleet.model.name, [mesh.url]) as load:
            await load.more(30)
    finally:
        mesh.fleet.signal(FACADE, A, signal.SIGCONT)

    assert [] == load.faults
