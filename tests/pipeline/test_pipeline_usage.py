"""Usage records account for all device time, to the nanosecond, even if processes are killed."""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from tests.pipeline.services import Services
from trivium.cli.main import app

CLIENTS = 8
KEYS = ("alice", "bob")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "usage"


@pytest.fixture
def services(tiny_model: Path, tmp_path: Path, folder: Path) -> Iterator[Services]:
    keys = tmp_path / "keys"
    digests = [f"{hashlib.sha256(name.encode()).hexdigest()} {name}" for name in KEYS]
    keys.write_text("\n".join(digests))
    settings = {
        "TRIVIUM_FACADE_API_KEYS_FILE": keys,
        "TRIVIUM_FACADE_USAGE_LOG": folder,
        "TRIVIUM_GENERATOR_USAGE_LOG": folder,
    }
    with Services(tiny_model, tmp_path, **settings) as services:
        yield services


def records(folder: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{stage}.usage.jsonl").read_text().splitlines()]


def body(services: Services, number: int, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Tell me of {number}."}]
    return {"model": services.model, "messages": messages, "max_tokens": 40, **options}


async def ask(client: httpx.AsyncClient, services: Services, number: int) -> str:
    """Sends one of several kinds of requests; returns the outcome."""
    kinds: list[dict[str, Any]] = [
        {"stream": True, "ignore_eos": True},
        {"n": 2},
        {"stream": True, "ignore_eos": True, "max_tokens": 400},  # disconnects in mid-stream
        {"stream": True, "stop": ["e"]},
        {"ignore_eos": True, "max_tokens": 400},  # disconnects before the answer
    ]
    kind = number % len(kinds)
    headers = {"authorization": f"Bearer {KEYS[number % 2]}", "x-request-id": f"req_{number}"}
    request = client.build_request(
        "POST", "/v1/chat/completions", json=body(services, number, **kinds[kind]), headers=headers
    )
    try:
        async with asyncio.timeout(0.1 if kind == 4 else 60):
            response = await client.send(request, stream=True)
            try:
                async for text in response.aiter_text():
                    if kind == 2 and '"content":' in text:
                        return "left"
            finally:
                await response.aclose()
    except TimeoutError:
        return "left"
    except httpx.TransportError:
        return "lost"
    return str(response.status_code)


async def load(services: Services, killed: str) -> Counter[str]:
    """Requests of all kinds, during which a process is killed and restarted."""
    outcomes: Counter[str] = Counter()
    numbers = iter(range(10_000))
    done = asyncio.Event()

    async with httpx.AsyncClient(base_url=services.url, trust_env=False, timeout=60) as client:

        async def ask_on() -> None:
            while not done.is_set():
                outcomes[await ask(client, services, next(numbers))] += 1

        async with asyncio.TaskGroup() as tasks:
            for _ in range(CLIENTS):
                tasks.create_task(ask_on())
            await until(lambda: outcomes.total() > 20)
            await asyncio.to_thread(services.kill, killed)
            services.start(killed)
            await asyncio.to_thread(services.wait_until_ready)
            before = outcomes["200"]
            await until(lambda: outcomes["200"] > before + 10)
            done.set()
    return outcomes


async def until(holds: Any) -> None:
    async with asyncio.timeout(120):
        while not holds():  # noqa: ASYNC110 - no event for it
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("killed", ["rest_facade", "tokenizer_svc"])
def test_records_and_overhead_add_up_to_the_busy_time(
    services: Services, folder: Path, killed: str
) -> None:
    """This includes requests whose client disconnected, that failed or were lost by kill -9."""
    outcomes = asyncio.run(load(services, killed))
    metrics = services.wait_until_idle()
    charged = records(folder, "generator_svc")

    assert outcomes["left"]
    assert outcomes["200"]
    nanoseconds = sum(record["device_nanoseconds"] for record in charged)
    overhead = int(metrics["trivium_device_overhead_nanoseconds_total"])
    assert int(metrics["trivium_device_busy_nanoseconds_total"]) == nanoseconds + overhead
    assert set(KEYS) == {record["key"] for record in charged}
    assert {"abort", "length"} <= {record["finish_reason"] for record in charged}
    rows = json.loads(CliRunner().invoke(app, ["usage", str(folder), "--format", "json"]).output)
    assert nanoseconds == sum(row["device_nanoseconds"] for row in rows)
    if killed == "rest_facade":  # if the tokenizer dies, unanswered calls are retried
        by_id = Counter(record["request_id"] for record in charged if record["status"] == 200)
        assert {1} == set(by_id.values())
    refused = records(folder, "rest_facade")
    assert {0} == {record["device_nanoseconds"] for record in refused}
    # The others also stop cleanly, without losing records.
    for name in ("rest_facade", "tokenizer_svc", "generator_svc"):
        services.terminate(name)
        services.processes[name].wait(60)
    assert len(charged) == len(records(folder, "generator_svc"))


def test_each_prompt_of_a_request_has_its_own_record(services: Services, folder: Path) -> None:
    """Their numbers add up to the answer's usage, and they count as one request."""
    with httpx.Client(base_url=services.url, trust_env=False, timeout=60) as client:
        usage = client.post(
            "/v1/completions",
            json={"model": services.model, "prompt": ["Once", "Upon a time"], "max_tokens": 5},
            headers={"authorization": "Bearer alice", "x-request-id": "req_two"},
        ).json()["usage"]
    services.wait_until_idle()
    charged = records(folder, "generator_svc")
    [row] = json.loads(CliRunner().invoke(app, ["usage", str(folder), "--format", "json"]).output)

    assert ["req_two"] * 2 == [record["request_id"] for record in charged]
    assert usage["gpu_seconds"] == sum(record["device_nanoseconds"] for record in charged) / 1e9
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (
        row["prompt_tokens"],
        row["completion_tokens"],
    )
    assert (1, 0) == (row["requests"], row["failed"])


def test_a_record_matches_the_response(services: Services, folder: Path) -> None:
    """Tokens, device time and finish reason are those of the answer, including stop strings."""
    headers = {"authorization": "Bearer bob", "x-request-id": "req_told"}
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    with httpx.Client(base_url=services.url, trust_env=False, timeout=60) as client:
        answer = client.post(
            "/v1/chat/completions",
            json=body(services, 1, n=3, stop=["e", "a"], seed=1),
            headers=headers | trace | {"x-trivium-key-name": "mallory"},
        ).json()
    services.wait_until_idle()
    services.until(lambda: (folder / "generator_svc.usage.jsonl").read_text(), "no record")
    [record] = records(folder, "generator_svc")

    usage = answer["usage"]
    assert usage["prompt_tokens"] == record["prompt_tokens"]
    assert usage["completion_tokens"] == record["completion_tokens"]
    assert usage["gpu_seconds"] == record["gpu_seconds"] == record["device_nanoseconds"] / 1e9
    assert usage["prompt_tokens_details"]["cached_tokens"] == record["cached_tokens"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == record["reasoning_tokens"]
    reasons = dict.fromkeys(choice["finish_reason"] for choice in answer["choices"])
    assert ",".join(reasons) == record["finish_reason"]
    assert ("bob", "req_told", 200) == (record["key"], record["request_id"], record["status"])
    assert "0af7651916cd43dd8448eb211c80319c" == record["trace_id"]
    assert not records(folder, "rest_facade")


def test_a_full_disk_fails_no_request(tiny_model: Path, tmp_path: Path, folder: Path) -> None:
    """Both processes count the records they lose and log a line of JSON."""
    folder.mkdir()
    stages = ("generator_svc", "rest_facade")
    for stage in stages:
        (folder / f"{stage}.usage.jsonl").symlink_to("/dev/full")
    settings = {f"TRIVIUM_{name}_USAGE_LOG": folder for name in ("GENERATOR", "FACADE")}
    with (
        Services(tiny_model, tmp_path, **settings) as services,
        httpx.Client(base_url=services.url, trust_env=False, timeout=60) as client,
    ):
        statuses = [
            client.post("/v1/chat/completions", json=body(services, 1, n=n)).status_code
            for n in (1, 1, 0, 0)
        ]
        generator = services.wait_until_idle()["trivium_usage_records_lost_total"]
        facade = client.get("/metrics").text.splitlines()
        lines = {stage: services.log(stage).splitlines() for stage in stages}

    assert [200, 200, 400, 400] == statuses
    assert 2 == generator
    assert "trivium_usage_records_lost_total 2.0" in facade
    for stage in stages:
        [told] = [line for line in map(json.loads, lines[stage]) if line["level"] == "error"]
        assert f"{folder / stage}.usage.jsonl: No space left on device" in told["message"]
