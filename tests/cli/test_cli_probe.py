"""Health probes of containers and the doctor, and execution providers that are really tried."""

import asyncio
import sys
from unittest.mock import Mock

import onnxruntime
import pytest

from tests.cli.openai_script import ScriptedServer
from tests.examples.chat_script import NAMES, ScriptedChat, scripted_server
from trivium.cli import providers
from trivium.cli.probe import fault, is_ready


async def exit_status(address: str) -> int:
    """The exit status of a container's health check of `address`."""
    command = (sys.executable, "-m", "trivium.cli.probe", address)
    return await (await asyncio.create_subprocess_exec(*command)).wait()


async def test_grpc_services_are_probed_by_name() -> None:
    """A service that cannot serve is not ready although its process is; unknown ones never are."""
    server = scripted_server(ScriptedChat())
    target = f"grpc://127.0.0.1:{await server.start('127.0.0.1:0')}"
    server.set_serving(True, [""])

    assert await is_ready(target)
    assert not await is_ready(f"{target}/{NAMES[0]}")
    assert not await is_ready(f"{target}/no.such.Service")
    server.set_serving(True)
    assert await exit_status(f"{target}/{NAMES[0]}") == 0
    await server.drain(0, 0)
    assert await exit_status(f"{target}/{NAMES[0]}") == 1


async def test_http_is_ready_only_with_status_200(scripted: ScriptedServer) -> None:
    """Any other status means not ready, also another success or a redirect, whatever the body."""
    assert await is_ready(f"{scripted.url}/v1/models")
    assert not await is_ready(f"{scripted.url}/nowhere")
    for scripted.models_status in (202, 302, 500, 503):
        assert not await is_ready(f"{scripted.url}/v1/models")


async def test_closed_port_is_not_ready(unused_tcp_port: int) -> None:
    """A port on which nothing listens is not ready, over HTTP or gRPC."""
    for scheme in ("http", "grpc"):
        assert not await is_ready(f"{scheme}://127.0.0.1:{unused_tcp_port}")


async def test_reason_for_not_being_ready_is_reported(
    scripted: ScriptedServer, unused_tcp_port: int
) -> None:
    """By an error's message or plain text; of several targets, the first that is not ready."""
    server = scripted_server(ScriptedChat())
    target = f"grpc://127.0.0.1:{await server.start('127.0.0.1:0')}"
    ready = f"{scripted.url}/v1/models"

    assert "" == await fault(ready)
    assert "Not Found" in await fault(ready, f"{scripted.url}/nowhere", target)
    assert "NOT_SERVING" in await fault(target)
    for scheme in ("http", "grpc"):
        assert "onnect" in await fault(f"{scheme}://127.0.0.1:{unused_tcp_port}")
    await server.drain(0, 0)


def test_the_cpu_provider_computes() -> None:
    """The provider that is always available runs the graph."""
    assert providers.why_not(providers.CPU) is None


def test_a_provider_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is cached, as creating a session takes seconds on CUDA."""
    providers.why_not.cache_clear()
    sessions = Mock(wraps=onnxruntime.InferenceSession)
    monkeypatch.setattr(onnxruntime, "InferenceSession", sessions)

    assert [None, None] == [providers.why_not(providers.CPU) for _ in range(2)]
    assert 1 == sessions.call_count


def test_missing_provider_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    """A provider that this build lacks gives a reason, not a crash."""
    assert providers.why_not("NoSuchExecutionProvider") == "not in this build of ONNX Runtime"
    assert capfd.readouterr().err == ""
