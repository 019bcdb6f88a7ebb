"""API keys with models, limits and an expiry, as clients see them."""

import asyncio
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry

from rest_facade.usage import RequestUsage
from tests.rest_facade.conftest import StartFacade
from tests.rest_facade.scripted_backend import MODEL, ScriptedBackend, delta, header
from trivium.keys.accounts import AccountsUnavailable, LimitStatus, LocalAccounts
from trivium.keys.key_file import ApiKey, KeyFile, KeyFileError
from trivium.keys.rate_limits import LimitMetrics, RateLimits
from trivium.wire.errors import ServiceError

URL = "/v1/chat/completions"
REQUEST = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}

Start = Callable[..., Any]


def table(name: str, /, **fields: object) -> str:
    """A key's table in the key file; the key is its name."""
    lines = [f"[keys.{name}]", f'digest = "{hashlib.sha256(name.encode()).hexdigest()}"']
    return "\n".join([*lines, *(f"{field} = {value}" for field, value in fields.items())]) + "\n"


def write(file: Path, *tables: str) -> None:
    file.write_text("\n".join(tables))


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


@pytest.fixture
def start(start_facade: StartFacade, file: Path) -> Start:
    """Starts a facade that accepts the keys in these tables."""

    async def started(*tables: str) -> httpx.AsyncClient:
        write(file, *tables)
        client: httpx.AsyncClient = await start_facade(api_keys_file=file)
        return client

    return started


async def ask(client: httpx.AsyncClient, key: str, **fields: object) -> httpx.Response:
    return await client.post(URL, json=REQUEST | fields, headers=bearer(key))


async def test_requests_per_minute(start: Start) -> None:
    """Beyond them, this key alone gets 429 with Retry-After; OpenAI's headers count down."""
    client = await start(table("a", requests_per_minute=2), table("b"))
    first, second, third = [await ask(client, "a") for _ in range(3)]
    other = await ask(client, "b")

    assert [200, 200, 429, 200] == [r.status_code for r in (first, second, third, other)]
    assert ["1", "0", "0"] == [
        r.headers["x-ratelimit-remaining-requests"] for r in (first, second, third)
    ]
    assert "2" == first.headers["x-ratelimit-limit-requests"]
    assert "30s" == first.headers["x-ratelimit-reset-requests"]
    assert "1m0s" == second.headers["x-ratelimit-reset-requests"]
    assert 28 <= int(third.headers["retry-after"]) <= 30
    error = third.json()["error"]
    assert ("rate_limit_exceeded", "rate_limit_error") == (error["code"], error["type"])
    assert "2 per minute" in error["message"]
    assert not [name for name in other.headers if name.startswith("x-ratelimit")]


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_per_minute(start: Start, stream: bool) -> None:
    """Tokens count when a request ends, streaming or not: 9 for prompt and answer together here."""
    client = await start(table("a", tokens_per_minute=12))
    first, second, third = [await ask(client, "a", stream=stream) for _ in range(3)]

    assert [200, 200, 429] == [r.status_code for r in (first, second, third)]
    assert ["12", "3", "0"] == [
        r.headers["x-ratelimit-remaining-tokens"] for r in (first, second, third)
    ]
    assert "12" == first.headers["x-ratelimit-limit-tokens"]
    assert "tokens" in third.json()["error"]["message"]
    assert 30 <= int(third.headers["retry-after"]) <= 35  # 7 more of 12 have to be refilled


async def test_a_cancelled_streams_tokens_count(start: Start, backend: ScriptedBackend) -> None:
    """The prompt counts, and the answer as far as it was sent."""
    client = await start(table("a", tokens_per_minute=10))
    backend.script = (header(), delta("He", tokens=5), None)
    request = {"json": REQUEST | {"stream": True}, "headers": bearer("a")}
    async with client.stream("POST", URL, **request) as answer:
        async for line in answer.aiter_lines():
            if "He" in line:
                break
    await backend.cancelled.wait()
    async with asyncio.timeout(30):
        while (await ask(client, "a", top_p=7)).status_code == 400:
            pass


async def test_concurrent_requests(start: Start, backend: ScriptedBackend) -> None:
    """Requests beyond the limit are refused until one ends, however it ends."""
    client = await start(table("a", concurrent_requests=1))
    backend.script = (header(), delta("He"), None)
    request = {"json": REQUEST | {"stream": True}, "headers": bearer("a")}
    async with client.stream("POST", URL, **request) as answer:
        second = await ask(client, "a")
        assert 200 == answer.status_code
    await backend.cancelled.wait()
    backend.script = (header(), ServiceError("internal_error", "Oh."))

    assert (429, "1") == (second.status_code, second.headers["retry-after"])
    async with asyncio.timeout(30):
        while (await ask(client, "a")).status_code != 500:
            pass
    assert 500 == (await ask(client, "a")).status_code


async def test_gpu_seconds_per_day(start: Start) -> None:
    """An answer takes 1.5 s of device time here; the limit resets at midnight."""
    client = await start(table("a", gpu_seconds_per_day=2.5))
    answers = [await ask(client, "a") for _ in range(3)]

    assert [200, 200, 429] == [answer.status_code for answer in answers]
    assert "2.5 per day" in answers[2].json()["error"]["message"]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 60


async def test_models(start: Start) -> None:
    """A key sees the models that it may use; to it, others do not exist."""
    client = await start(table("a", models=f'["{MODEL}"]'), table("b"))
    own, all_models = [
        [
            model["id"]
            for model in (await client.get("/v1/models", headers=bearer(key))).json()["data"]
        ]
        for key in ("a", "b")
    ]
    refused = [
        await ask(client, "a", model="org/other"),
        await ask(client, "a", model="org/other", stream=True),
        await client.get("/v1/models/org/other", headers=bearer("a")),
        await client.post(
            "/tokenize", json={"model": "org/other", "prompt": "x"}, headers=bearer("a")
        ),
        await client.post(
            "/v1/completions", json={"model": "org/other", "prompt": "x"}, headers=bearer("a")
        ),
    ]

    assert ([MODEL], [MODEL, "org/other"]) == (own, all_models)
    assert {(404, "model_not_found")} == {
        (answer.status_code, answer.json()["error"]["code"]) for answer in refused
    }
    assert 200 == (await ask(client, "a")).status_code
    assert 200 == (await client.get("/v1/models/org/other", headers=bearer("b"))).status_code


async def test_an_expired_key(start: Start) -> None:
    """A key is refused from its expiry on; a date means midnight UTC."""
    now = datetime.now(UTC)
    client = await start(
        table("past", expires=(now - timedelta(seconds=5)).strftime("%Y-%m-%dT%H:%M:%SZ")),
        table("today", expires=now.date()),
        table("later", expires=(now.date() + timedelta(days=2))),
        table("east", expires=(now + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%S+02:00")),
    )
    answers = {key: await ask(client, key) for key in ("past", "today", "later", "east")}

    assert {"past": 401, "today": 401, "later": 200, "east": 401} == {
        key: answer.status_code for key, answer in answers.items()
    }
    assert "has expired" in answers["past"].json()["error"]["message"]


async def test_the_official_client_raises_rate_limit_error(start: Start) -> None:
    """It raises the same exception as for OpenAI."""
    client = await start(table("a", requests_per_minute=1))
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="a", max_retries=0) as official:

        def complete() -> None:
            official.chat.completions.create(**REQUEST)

        await asyncio.to_thread(complete)
        with pytest.raises(openai.RateLimitError, match="Rate limit reached for requests"):
            await asyncio.to_thread(complete)


async def test_changed_limits_keep_what_was_used(
    start: Start, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was used before the change still counts."""
    monkeypatch.setattr("trivium.keys.watched_file.CHECK_SECONDS", 0)
    client = await start(table("a", requests_per_minute=1))
    before = [(await ask(client, "a")).status_code for _ in range(2)]
    write(file, table("a", requests_per_minute=3))
    after = [(await ask(client, "a")).status_code for _ in range(3)]

    assert ([200, 429], [200, 200, 429]) == (before, after)


async def test_totals_by_key(start: Start) -> None:
    """Requests and rejections are counted by key, the latter also by limit."""
    client = await start(table("a", requests_per_minute=1), table("b"))
    for key in ("a", "a", "b"):
        await ask(client, key)
    metrics = (await client.get("/metrics")).text

    assert 'trivium_key_requests_total{key="a"} 2.0' in metrics
    assert 'trivium_key_requests_total{key="b"} 1.0' in metrics
    assert 'trivium_key_rejections_total{key="a",limit="requests"} 1.0' in metrics


class Clock:
    """A clock that advances only when told to."""

    def __init__(self) -> None:
        self.now = 20_000 * 86_400.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limits(clock: Clock) -> RateLimits:
    return RateLimits(LimitMetrics(CollectorRegistry()), local=LocalAccounts(clock, clock))


async def one(
    limits: RateLimits, tokens: int = 0, nanoseconds: int | None = 0, **fields: Any
) -> float:
    """A request that takes this much; returns 0, or the seconds after which to retry."""
    usage = RequestUsage(taken=lambda: (tokens, nanoseconds))
    try:
        async with limits.admitted(ApiKey(name="a", digest="0" * 64, **fields), usage):
            pass
    except ServiceError as error:
        return error.retry_after or 0
    await asyncio.sleep(0)  # usage is counted once other tasks run
    return 0


async def test_the_request_limit_refills_within_a_minute(limits: RateLimits, clock: Clock) -> None:
    """Retrying after the given time succeeds once; unused requests do not add up."""
    assert [0, 0, 0, 20] == [await one(limits, requests_per_minute=3) for _ in range(4)]
    clock.now += 20
    assert [0, 20] == [await one(limits, requests_per_minute=3) for _ in range(2)]
    clock.now += 3_600
    assert [0, 0, 0, 20] == [await one(limits, requests_per_minute=3) for _ in range(4)]


async def test_overdrawn_tokens_delay_the_next_request(limits: RateLimits, clock: Clock) -> None:
    """A request may exceed what is left, and the next one waits correspondingly longer."""
    assert 0 == await one(limits, 180, tokens_per_minute=60)
    assert 121 == await one(limits, tokens_per_minute=60)
    clock.now += 121
    assert 0 == await one(limits, tokens_per_minute=60)


async def test_the_gpu_seconds_limit_resets_at_midnight(limits: RateLimits, clock: Clock) -> None:
    """The refusal says when that is."""
    clock.now += 86_000
    assert 0 == await one(limits, 9, 2_000_000_000, gpu_seconds_per_day=2)
    assert 400 == await one(limits, gpu_seconds_per_day=2)
    clock.now += 400
    assert 0 == await one(limits, gpu_seconds_per_day=2)


class HungStore(LocalAccounts):
    """A shared store that does not answer until it `works`."""

    def __init__(self) -> None:
        super().__init__()
        self.works = False
        self.tries = 0

    async def enter(self, key: ApiKey, request: str) -> LimitStatus:
        self.tries += 1
        if self.works:
            return await super().enter(key, request)
        await asyncio.sleep(0.05)
        raise AccountsUnavailable("Timeout reading from 10.0.0.1:6379")


async def test_one_request_at_a_time_waits_for_a_store_that_is_down(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It finds out whether the store works again; the others do not wait for that. The log has one
    line when the outage begins, and one when it is over."""
    monkeypatch.setattr("trivium.keys.rate_limits._PAUSE_SECONDS", 0.1)
    caplog.set_level("INFO", "trivium.keys")
    store = HungStore()
    limits = RateLimits(LimitMetrics(CollectorRegistry()), store)
    await one(limits)
    await asyncio.sleep(0.11)
    await asyncio.gather(*(one(limits) for _ in range(20)))
    tries = store.tries
    store.works = True
    await asyncio.sleep(0.11)
    await asyncio.gather(*(one(limits) for _ in range(20)))
    await one(limits)

    assert 2 == tries
    assert 2 + 1 < store.tries
    assert ["unavailable", "available again"] == [
        "available again" if "again" in line else "unavailable" for line in caplog.messages
    ]


async def test_gpu_seconds_of_interrupted_requests_are_estimated(limits: RateLimits) -> None:
    """It is estimated from the past cost per token, so that disconnecting is not free."""
    assert 0 == await one(limits, 10, 1_000_000_000)
    assert 0 == await one(limits, 10, None, gpu_seconds_per_day=2)
    assert 0 < await one(limits, gpu_seconds_per_day=2)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (table("a", requests_per_minute=0), "keys.a.requests_per_minute"),
        (table("a", requests_per_minute='"9"'), "keys.a.requests_per_minute"),
        (table("a", models='"m"'), "keys.a.models"),
        (table("a", expires='"soon"'), "keys.a.expires"),
        (table("a", colour="1"), "keys.a.colour"),
        (table("a", name='"b"'), "keys.a"),
        ("[keys.a]\n", "keys.a.digest"),
        ('[keys.a]\ndigest = "sk-secret"\n', "keys.a.digest"),
        ('[keys."a b"]\n', "a key's name has 1 to 64"),
        ("[[keys]]\n", r"tables \[keys.NAME\]"),
        ("[key.a]\n", r"tables \[keys.NAME\], not key"),
        ("[keys.a\n", "line 1"),
        (table("a") + table("a").replace("keys.a", "keys.b"), "a and b have the same digest"),
    ],
)
def test_invalid_limits_are_refused(file: Path, text: str, fault: str) -> None:
    """The error is one line that names the key and the field, and contains no secret."""
    file.write_text(text)
    with pytest.raises(KeyFileError, match=fault) as caught:
        KeyFile(file)

    assert "\n" not in str(caught.value)
    assert "sk-secret" not in str(caught.value)
