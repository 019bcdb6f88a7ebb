"""Keys at every port of the three real services, as in docs/security.md."""

import asyncio
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from fastapi.routing import APIRoute

from rest_facade.backend import Backend
from rest_facade.config import FacadeSettings
from rest_facade.metrics import Metrics
from rest_facade.routes import Routes
from tests.completion_requests import chat_request
from tests.pipeline.services import Services
from trivium.chat.v1 import chat_pb2, chat_pb2_grpc, completion_pb2, model_pb2
from trivium.generator.v1 import generator_pb2
from trivium.tokenizer.v1 import tokenizer_pb2
from trivium.wire.channel import open_channel
from trivium.wire.in_flight import InFlight

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"
HEALTH, REFLECTION = "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"
YESTERDAY = "2026-01-01"


def table(name: str, /, **fields: object) -> str:
    """A key's table in the key file; the key is its name."""
    lines = [f"[keys.{name}]", f'digest = "{hashlib.sha256(name.encode()).hexdigest()}"']
    return "\n".join([*lines, *(f"{field} = {value}" for field, value in fields.items())]) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def services(tiny_model: Path, folder: Path) -> Iterator[Services]:
    """One key file for all services, and a key for each stage that calls another."""
    keys = folder / "keys.toml"
    stages = [table(name, stage="true") for name in ("facade", "tokenizer")]
    clients = [table("alice"), table("bob"), table("old", expires=YESTERDAY)]
    keys.write_text("\n".join([*clients, *stages]))
    for name in ("facade", "tokenizer"):
        (folder / f"{name}.key").write_text(f"{name}\n")
    settings = {
        "TRIVIUM_FACADE_API_KEYS_FILE": keys,
        "TRIVIUM_FACADE_TOKENIZER_API_KEY_FILE": folder / "facade.key",
        "TRIVIUM_TOKENIZER_API_KEYS_FILE": keys,
        "TRIVIUM_TOKENIZER_GENERATOR_API_KEY_FILE": folder / "tokenizer.key",
        "TRIVIUM_GENERATOR_API_KEYS_FILE": keys,
        "TRIVIUM_GENERATOR_USAGE_LOG": folder,
    }
    with Services(tiny_model, folder, **settings) as services:
        yield services


def open_without_key(port: str) -> set[str]:
    """What is open at a port without a key, according to the document."""
    (row,) = re.findall(rf"^\| {port} \|.*$", DOCUMENT.read_text(), re.M)
    return set(re.findall(r"`([^`]+)`", row.split("|")[4]))


def body(services: Services) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    return {"model": services.model, "messages": messages, "max_tokens": 4}


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


def test_a_call_is_authenticated_at_each_stage_and_counts_for_its_key(
    services: Services, folder: Path
) -> None:
    """By HTTP or gRPC, each stage uses its own key and passes on the name of the caller's."""

    async def by_grpc() -> int:
        async with open_channel(services.chat_target) as channel:
            stub: Any = chat_pb2_grpc.ChatServiceStub(channel)
            content = [chat_pb2.ContentPart(text="Hello")]
            message = chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content=content)
            request = chat_request(
                model=services.model, messages=[message], max_completion_tokens=4
            )
            answer = await stub.CreateChatCompletion(request, metadata=bearer("alice"))
            return int(answer.usage.completion_tokens)

    answer = httpx.post(
        f"{services.url}/v1/chat/completions",
        json=body(services),
        headers={"authorization": "Bearer alice"},
    )
    tokens = asyncio.run(by_grpc())
    services.wait_until_idle()
    lines = (folder / "generator_svc.usage.jsonl").read_text().splitlines()

    assert 200 == answer.status_code, answer.text
    assert 0 < tokens <= 4
    assert ["alice"] * len(lines) == [json.loads(line)["key"] for line in lines]
    assert len(lines) >= 2


def test_only_documented_paths_are_open_without_a_key(services: Services) -> None:
    """The facade's paths are tried without a key, with a wrong, an expired and a stage's key."""

    async def paths() -> list[APIRoute]:
        async with Backend(services.chat_target) as backend:
            routes = Routes(FacadeSettings(), backend, InFlight(), Metrics()).router().routes
            return [route for route in routes if isinstance(route, APIRoute)]

    found: dict[str, set[int]] = {}
    for route in asyncio.run(paths()):
        path = route.path.replace("{id:path}", services.model)
        for method, key in itertools.product(route.methods, ("", "bad", "old", "facade")):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            json_body = body(services) if method == "POST" else None
            answer = httpx.request(method, services.url + path, json=json_body, headers=headers)
            found.setdefault(route.path, set()).add(answer.status_code)

    assert len(found) > 10
    assert open_without_key("8000") == {
        path for path, statuses in found.items() if statuses == {200}
    }
    assert {(200,), (401,)} == {tuple(statuses) for statuses in found.values()}


def all_methods() -> dict[str, Any]:
    """Every method in our protocols, with its descriptor."""
    modules = (chat_pb2, completion_pb2, model_pb2, tokenizer_pb2, generator_pb2)
    return {
        f"/{service.full_name}/{method.name}": method
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


async def status(channel: grpc.aio.Channel, name: str, method: Any, key: str) -> grpc.StatusCode:
    """The status of a call with an empty message, or OK if it answers."""
    metadata = bearer(key) if key else ()
    shape = "stream" if method is None or method.client_streaming else "unary"
    shape += "_stream" if method is None or method.server_streaming else "_unary"
    call = getattr(channel, shape)(name)
    call = (
        call(metadata=metadata, timeout=20)
        if shape.startswith("stream")
        else call(b"", metadata=metadata, timeout=20)
    )
    try:
        # Nothing is written to the stream: a failing write would hide the status.
        if shape.endswith("stream"):
            if await call.read() is grpc.aio.EOF:
                return grpc.StatusCode(await call.code())
            call.cancel()
        else:
            await call
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        return grpc.StatusCode(await call.code())
    return grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("port", "keys"), [("50051", ("", "bad", "old")), ("50052", ("", "bad", "old", "alice"))]
)
async def test_only_documented_methods_are_open_without_a_key(
    services: Services, port: str, keys: tuple[str, ...]
) -> None:
    """All methods are tried at both gRPC ports; a client's key does not open a generator."""
    target = services.chat_target if port == "50051" else services.generator_target

    async def walk() -> dict[str, set[grpc.StatusCode]]:
        found: dict[str, set[grpc.StatusCode]] = {}
        async with open_channel(target) as channel:
            for (name, method), key in itertools.product(all_methods().items(), keys):
                found.setdefault(name, set()).add(await status(channel, name, method, key))
        return found

    async def is_open(name: str, method: str) -> bool:
        async with open_channel(target) as channel:
            shape = "unary_unary" if name == HEALTH else "stream_stream"
            call = getattr(channel, shape)(f"/{name}/{method}")
            call = call(b"") if name == HEALTH else call()
            if name != HEALTH:
                await call.done_writing()
            return bool(await call.code() is grpc.StatusCode.OK)

    found = await walk()
    served = {name for name, codes in found.items() if codes != {grpc.StatusCode.UNIMPLEMENTED}}
    of_stage = "/trivium.generator." if port == "50052" else ("/trivium.chat.", "/trivium.tok")

    assert served == {name for name in found if name.startswith(of_stage)}
    assert {grpc.StatusCode.UNAUTHENTICATED} == set().union(*(found[name] for name in served))
    assert {HEALTH, REFLECTION} == open_without_key(port)
    assert await is_open(HEALTH, "Check")
    assert await is_open(REFLECTION, "ServerReflectionInfo")


def test_metrics_ports_need_no_key(services: Services) -> None:
    """They are open as the document says, which advises to restrict them by network."""
    for name, port in (
        ("9051", services.pipeline.tokenizer_metrics_port),
        ("9052", services.pipeline.generator_metrics_port),
    ):
        paths = ("/metrics", "/healthz", "/livez")
        statuses = [httpx.get(f"http://127.0.0.1:{port}{path}").status_code for path in paths]

        assert [200] * 3 == statuses
        assert set(paths) == open_without_key(name)


@pytest.mark.parametrize("key", ["alice2", "bob"])
def test_a_facade_reports_that_its_key_is_refused(
    services: Services, folder: Path, key: str
) -> None:
    """Clients get an error and the log has the reason, both for an unknown key and for a client's
    key, which may not be used for other clients' requests."""
    wrong = folder / "wrong.key"
    wrong.write_text(key)
    services.terminate("rest_facade")
    services.processes["rest_facade"].wait()
    services.start("rest_facade", TRIVIUM_FACADE_TOKENIZER_API_KEY_FILE=wrong)
    services.until(lambda: services.health() in (200, 503), "the facade does not answer")
    health = httpx.get(f"{services.url}/health")
    answer = httpx.post(
        f"{services.url}/v1/chat/completions",
        json=body(services),
        headers={"authorization": "Bearer alice"},
    )
    services.kill("rest_facade")
    services.start("rest_facade")
    services.wait_until_ready()

    assert [503, 503] == [health.status_code, answer.status_code], answer.text
    assert "refuses this server's key" in health.json()["error"]["message"]
    assert "backend_unavailable" == answer.json()["error"]["code"]
    assert "refuses this server's key" in answer.json()["error"]["message"]
    assert "the tokenizer refuses this stage's key" in services.log("rest_facade")


def test_a_tokenizer_reports_that_its_key_is_refused(services: Services, folder: Path) -> None:
    """It then has no generator, and reports the reason."""
    services.terminate("tokenizer_svc")
    services.processes["tokenizer_svc"].wait()
    services.start("tokenizer_svc", TRIVIUM_TOKENIZER_GENERATOR_API_KEY_FILE=folder / "facade.no")
    assert 2 == services.processes["tokenizer_svc"].wait()
    (folder / "other.key").write_text("other")
    services.start("tokenizer_svc", TRIVIUM_TOKENIZER_GENERATOR_API_KEY_FILE=folder / "other.key")

    def fault() -> str:
        headers = {"authorization": "Bearer alice"}
        return httpx.get(f"{services.url}/v1/models", headers=headers).text

    services.until(
        lambda: "refuses the tokenizer's key" in fault(), "the refused key is not reported"
    )
    services.kill("tokenizer_svc")
    services.start("tokenizer_svc")
    services.wait_until_ready()
    assert "facade.no: cannot be read" in services.log("tokenizer_svc")


@pytest.mark.parametrize("service", ["rest_facade", "tokenizer_svc", "generator_svc"])
def test_remote_access_without_keys_is_refused(service: str, tiny_model: Path) -> None:
    """The process exits with one line that says what to set, unless remote access is allowed."""
    prefix = {"rest_facade": "FACADE", "tokenizer_svc": "TOKENIZER", "generator_svc": "GENERATOR"}
    prefix = f"TRIVIUM_{prefix[service]}_"
    environment = {
        **os.environ,
        f"{prefix}HOST": "0.0.0.0",
        f"{prefix}PORT": "0",
        f"{prefix}MODEL_DIRECTORY": str(tiny_model),
    }
    ended = subprocess.run(
        [sys.executable, "-m", service], env=environment, capture_output=True, text=True, timeout=60
    )

    assert 2 == ended.returncode
    assert f"{prefix}HOST: 0.0.0.0 can be reached by other hosts" in ended.stderr
    assert f"{prefix}API_KEYS_FILE" in ended.stderr
    assert f"{prefix}ALLOW_UNAUTHENTICATED_REMOTE=true" in ended.stderr
    assert 1 == len(ended.stderr.splitlines())
