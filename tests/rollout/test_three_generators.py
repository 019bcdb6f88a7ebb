"""Three generators, two tokenizers and two facades under load and an operator's actions."""

import asyncio
import signal
from collections.abc import Iterator

import pytest

from tests.rollout.fleet import FACADE, GENERATOR, POLL_SECONDS, TOKENIZER, Fleet
from tests.rollout.load import Load, loaded
from tests.tiny_models import tiny_model_directory

pytestmark = pytest.mark.slow

A, B, C, D = (f"127.0.0.{number}" for number in (12, 13, 14, 15))
HOSTS = {GENERATOR: (A, B, C), TOKENIZER: (A, B), FACADE: (A, B)}
CALLERS = {TOKENIZER: GENERATOR, FACADE: TOKENIZER}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(tiny_model_directory(), tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest.fixture
async def fleet(started: Fleet) -> Fleet:
    """All of HOSTS and no others: ready, in DNS, and known to their callers."""
    if (GENERATOR, D) in started.processes:
        await started.kill(GENERATOR, D)
    for stage, hosts in HOSTS.items():
        started.publish(stage, *hosts)
        missing = [host for host in hosts if (stage, host) not in started.processes]
        await started.start(stage, *missing)
    await until_known(started)
    return started


async def until_known(fleet: Fleet) -> None:
    """Returns once each caller sees all replicas of the next stage that are in DNS."""
    async with asyncio.timeout(60):
        for caller, callee in CALLERS.items():
            published = set(fleet.names.names[f"{callee}.test"])
            for host in HOSTS[caller]:
                while await fleet.callees(caller, host) != published:  # noqa: ASYNC110 - no event for it
                    await asyncio.sleep(POLL_SECONDS)


def urls(fleet: Fleet) -> list[str]:
    return [fleet.url(host) for host in HOSTS[FACADE]]


async def until_all_busy(fleet: Fleet, load: Load) -> None:
    """Returns once each generator and each tokenizer has answered a new request."""
    replicas = [(stage, host) for stage in (GENERATOR, TOKENIZER) for host in HOSTS[stage]]
    before = [await fleet.tokens(*replica) for replica in replicas]
    async with asyncio.timeout(60):
        for replica, tokens in zip(replicas, before, strict=True):
            while await fleet.tokens(*replica) == tokens:
                await load.more(1)


async def test_a_rolling_restart_fails_no_request(fleet: Fleet) -> None:
    """No request fails; each process exits with 0 and is back at its address, still in DNS."""
    statuses = []
    async with loaded(fleet.model.name, urls(fleet)) as load:
        await until_all_busy(fleet, load)
        for stage, hosts in HOSTS.items():
            for host in hosts:
                fleet.signal(stage, host, signal.SIGTERM)
                statuses.append(await fleet.ended(stage, host))
                await fleet.start(stage, host)
                await until_known(fleet)
        await until_all_busy(fleet, load)

    assert [] == load.faults
    assert [0] * 7 == statuses


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_generator_dies_while_another_one_drains(
    fleet: Fleet, number: signal.Signals
) -> None:
    """Whether it dies or freezes, the third one takes over, and only running streams are lost."""
    async with loaded(fleet.model.name, urls(fleet)) as load:
        await until_all_busy(fleet, load)
        fleet.signal(GENERATOR, A, signal.SIGTERM)
        fleet.signal(GENERATOR, B, number)
        try:
            status = await fleet.ended(GENERATOR, A)
            await load.more(30)
        finally:
            await fleet.kill(GENERATOR, B)
        health = {said for heard in load.balancer.health.values() for said in heard}

    assert [] == [fault for fault in load.faults if not fault.begun]
    assert len(load.faults) <= load.streams
    assert {"ready"} == health
    assert 0 == status


async def test_a_fourth_generator_takes_its_share(fleet: Fleet) -> None:
    """This holds though the load is light and all share a system prompt that it has not cached."""
    system = "Tell me of whales and ships. " * 40
    async with loaded(fleet.model.name, urls(fleet), clients=2, system=system) as load:
        await load.more(160)
        await fleet.start(GENERATOR, D)
        fleet.publish(GENERATOR, *HOSTS[GENERATOR], D)
        await until_known(fleet)
        before = [await fleet.tokens(GENERATOR, host) for host in (A, B, C, D)]
        await load.more(100)
        after = [await fleet.tokens(GENERATOR, host) for host in (A, B, C, D)]
    tokens = [now - then for now, then in zip(after, before, strict=True)]

    assert [] == load.faults
    assert 0.1 < tokens[3] / sum(tokens) < 0.5
