"""Replicas are replaced, drained, killed, frozen, added, or have another model, under load."""

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from tests.rollout.fleet import FACADE, GENERATOR, TOKENIZER, Fleet
from tests.rollout.load import Load, loaded
from tests.tiny_models import tiny_model_directory
from trivium.model_directory import load_model_directory

pytestmark = pytest.mark.slow

A, B, C = "127.0.0.2", "127.0.0.3", "127.0.0.4"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(tiny_model_directory(), tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest.fixture
async def fleet(started: Fleet) -> AsyncIterator[Fleet]:
    """Two ready replicas of each stage at A and B, both in DNS."""
    for stage in (GENERATOR, TOKENIZER, FACADE):
        for host in (A, B):
            if (stage, host) not in started.processes:
                await started.start(stage, host)
        started.publish(stage, A, B)
    # After the previous test they may know no replica, or only one.
    await until_pipeline_ready(started)
    for stage in (GENERATOR, TOKENIZER):
        await started.until_known(stage, A, B)
    yield started
    for stage, host in list(started.processes):
        if host == C:
            await started.kill(stage, host)


async def until_pipeline_ready(fleet: Fleet) -> None:
    """Returns once all tokenizers and facades have a generator behind them."""
    for stage in (TOKENIZER, FACADE):
        for host in (A, B):
            await fleet.until_ready(stage, host)


async def busy(fleet: Fleet, load: Load, stage: str) -> None:
    """Returns once the replica at A gets a share of the load."""
    before = await fleet.tokens(stage, A)
    async with asyncio.timeout(60):
        while await fleet.tokens(stage, A) == before:
            await load.more(1)


def facades(fleet: Fleet, *hosts: str) -> list[str]:
    return [fleet.url(host) for host in hosts]


@pytest.mark.parametrize("stage", [GENERATOR, TOKENIZER])
async def test_the_only_replica_is_replaced(fleet: Fleet, stage: str) -> None:
    """Its successor is ready and in DNS before it stops: no client and no health check notices."""
    fleet.publish(stage, A)
    await fleet.kill(stage, B)
    async with loaded(fleet.model.name, facades(fleet, A, B)) as load:
        await load.more(10)
        await fleet.start(stage, C)
        fleet.publish(stage, C)
        fleet.signal(stage, A, signal.SIGTERM)
        status = await fleet.ended(stage, A)
        await load.more(30)

    assert [] == load.faults
    assert {"ready"} == {said for heard in load.balancer.health.values() for said in heard}
    assert 0 == status


@pytest.mark.parametrize(
    ("stage", "number"),
    [(GENERATOR, signal.SIGTERM), (TOKENIZER, signal.SIGHUP), (FACADE, signal.SIGTERM)],
)
async def test_one_of_two_is_drained(fleet: Fleet, stage: str, number: signal.Signals) -> None:
    """No request fails, whichever stage is drained, and the process exits with 0."""
    async with loaded(fleet.model.name, facades(fleet, A, B)) as load:
        if stage != FACADE:
            await busy(fleet, load, stage)
        await load.more(10)
        fleet.publish(stage, B)
        fleet.signal(stage, A, number)
        status = await fleet.ended(stage, A)
        await load.more(30)

    assert [] == load.faults
    assert 0 == status
    assert {"ready"} == set(load.balancer.health[fleet.url(B)])


async def test_a_draining_facade_is_not_ready_but_serves(fleet: Fleet) -> None:
    """During the notice period it is not ready but answers, and closes connections afterwards."""
    body = {
        "model": fleet.model.name,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 2,
    }
    async with httpx.AsyncClient(base_url=fleet.url(A), trust_env=False, timeout=30) as client:
        kept = await client.post("/v1/chat/completions", json=body)
        fleet.signal(FACADE, A, signal.SIGTERM)
        while (health := await client.get("/health")).status_code == 200:
            pass
        served = await client.post("/v1/chat/completions", json=body)
    status = await fleet.ended(FACADE, A)

    assert 200 == kept.status_code
    assert "close" != kept.headers.get("connection")
    assert (503, "draining") == (health.status_code, health.json()["error"]["code"])
    assert (200, "close") == (served.status_code, served.headers["connection"])
    assert 0 == status


@pytest.mark.parametrize("stage", [GENERATOR, TOKENIZER])
async def test_one_of_two_is_killed(fleet: Fleet, stage: str) -> None:
    """kill -9 ends running streams and nothing else, even while DNS still has the replica."""
    async with loaded(fleet.model.name, facades(fleet, A, B)) as load:
        await busy(fleet, load, stage)
        await fleet.kill(stage, A)
        await load.more(30)

    assert [] == [fault for fault in load.faults if not fault.begun]
    assert len(load.faults) <= load.streams
    assert {"ready"} == {said for heard in load.balancer.health.values() for said in heard}


@pytest.mark.parametrize("stage", [GENERATOR, TOKENIZER])
async def test_one_of_two_is_frozen(fleet: Fleet, stage: str) -> None:
    """Calls that it had not begun to answer are retried on the other one; later calls go there."""
    async with loaded(fleet.model.name, facades(fleet, A, B)) as load:
        await busy(fleet, load, stage)
        fleet.signal(stage, A, signal.SIGSTOP)
        try:
            await load.more(40)
        finally:
            fleet.signal(stage, A, signal.SIGCONT)

    assert [] == [fault for fault in load.faults if not fault.begun]
    assert len(load.faults) <= load.streams


@pytest.mark.parametrize("stage", [GENERATOR, TOKENIZER])
async def test_a_replica_leaves_dns_and_returns(fleet: Fleet, stage: str) -> None:
    """A replica removed from DNS gets no calls, though it runs and no connection breaks; once it is
    back in DNS it soon gets its share, long before connections age out."""
    async with loaded(fleet.model.name, facades(fleet, A, B)) as load:
        fleet.publish(stage, A)
        async with asyncio.timeout(30):
            before = -1.0
            while before != (before := await fleet.tokens(stage, B)):
                await load.more(30)
        await load.more(30)
        gone = await fleet.tokens(stage, B)
        fleet.publish(stage, A, B)
        async with asyncio.timeout(20):
            while await fleet.tokens(stage, B) == gone:
                await load.more(1)
        counts = [await fleet.tokens(stage, host) for host in (A, B)]
        await load.more(240)  # so that what A was busy with before hardly counts
        shares = [await fleet.tokens(stage, host) for host in (A, B)]
    share = (shares[1] - counts[1]) / (sum(shares) - sum(counts))

    assert [] == load.faults
    assert before == gone
    assert 0.25 < share < 0.75


async def test_two_generators_have_the_cache_hits_of_one(fleet: Fleet) -> None:
    """Each conversation's turns go where it is cached, through any facade and tokenizer."""
    fleet.publish(GENERATOR, A)
    await fleet.kill(GENERATOR, B)
    one = await cached_tokens(fleet, "one")
    await fleet.start(GENERATOR, B)
    fleet.publish(GENERATOR, A, B)
    await fleet.until_known(GENERATOR, A, B)  # tokenizers may notice at different times
    async with loaded(fleet.model.name, facades(fleet, A, B)) as load, asyncio.timeout(30):
        while not await fleet.tokens(GENERATOR, B):
            await load.more(1)
    before = [await fleet.tokens(GENERATOR, host) for host in (A, B)]
    # All six have the same home one time in 32, but not repeatedly.
    two = [await cached_tokens(fleet, name) for name in ("two", "three", "four")]
    after = [await fleet.tokens(GENERATOR, host) for host in (A, B)]

    assert min(two) >= 0.95 * one
    assert min(after[host] - before[host] for host in (0, 1)) > 0


async def cached_tokens(fleet: Fleet, name: str) -> int:
    """The cached tokens of six interleaved conversations of four turns each."""
    conversations: list[list[dict[str, str]]] = [[] for _ in range(6)]
    cached = 0
    async with httpx.AsyncClient(trust_env=False, timeout=120) as client:
        for turn, number in itertools.product(range(4), range(6)):
            messages = conversations[number]
            text = f"{number} {name}, turn {turn}. " + "Tell me of whales and ships. " * 8
            messages.append({"role": "user", "content": text})
            url = fleet.url((A, B)[(number + turn) % 2])
            answer = await client.post(
                f"{url}/v1/chat/completions",
                json={"model": fleet.model.name, "messages": messages, "max_tokens": 8},
            )
            messages.append({"role": "assistant", "content": "I see."})
            cached += answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached


async def test_generators_of_another_revision_get_no_requests(fleet: Fleet, tmp_path: Path) -> None:
    """They get no requests while there is a replica of the right revision; without one, errors and
    /health name both revisions; once there is one again, requests succeed."""
    other = tmp_path / fleet.model.name
    other.symlink_to(tiny_model_directory("qwen2"))
    await fleet.kill(GENERATOR, B)
    await fleet.start(GENERATOR, C, TRIVIUM_GENERATOR_MODEL_DIRECTORY=other)
    fleet.publish(GENERATOR, A, C)
    for host in (A, B):
        await fleet.kill(TOKENIZER, host)
        await fleet.start(TOKENIZER, host)
    async with loaded(fleet.model.name, facades(fleet, A, B)) as load:
        await load.more(30)
    tokens = await fleet.tokens(GENERATOR, C)

    assert [] == load.faults
    assert 0 == tokens

    await fleet.kill(GENERATOR, A)
    async with httpx.AsyncClient(base_url=fleet.url(A), trust_env=False, timeout=30) as client:
        async with asyncio.timeout(60):
            while "revision" not in (health := await client.get("/health")).text:
                pass
        refused = await client.post("/v1/completions", json={"model": other.name, "prompt": "Hi"})
        models = await client.get("/v1/models")
        await fleet.start(GENERATOR, A)
        async with asyncio.timeout(60):
            while (await client.get("/health")).status_code != 200:
                pass

    for answer in (health, refused, models):
        error = answer.json()["error"]
        assert (503, "revision_mismatch") == (answer.status_code, error["code"])
        for model in (fleet.model, other):
            assert load_model_directory(model).revision in error["message"]


async def test_a_stream_that_outlasts_the_drain(fleet: Fleet) -> None:
    """It ends with an error that gives the reason; a non-streaming request is retried elsewhere."""
    for host in (A, B):
        await fleet.kill(GENERATOR, host)
    await fleet.start(GENERATOR, A, TRIVIUM_GENERATOR_DRAIN_SECONDS=0.2)
    fleet.publish(GENERATOR, A, B)
    await until_pipeline_ready(fleet)
    body = {
        "model": fleet.model.name,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 1900,
        "n": 8,
        "ignore_eos": True,
    }
    async with httpx.AsyncClient(base_url=fleet.url(A), trust_env=False, timeout=120) as client:
        stream = client.stream("POST", "/v1/chat/completions", json={**body, "stream": True})
        async with stream as answer:
            parts = answer.aiter_text()
            text = await anext(parts)
            whole = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await fleet.start(GENERATOR, B)
            fleet.signal(GENERATOR, A, signal.SIGTERM)
            text += "".join([part async for part in parts])
        status = await fleet.ended(GENERATOR, A)
        made = await whole

    assert '"code":"draining"' in text.split("\n\n")[-2]
    assert "[DONE]" not in text
    assert 0 == status
    assert (200, 8) == (made.status_code, len(made.json()["choices"]))
