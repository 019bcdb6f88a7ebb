"""The metrics port as probes use it."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge

from tests.ports import free_port
from trivium.wire import metrics_server
from trivium.wire.metrics_server import serve_metrics
from trivium.wire.serving import GrpcServer

SERVICE = "trivium.chat.v1.ChatService"


class Stage:
    """A gRPC server without services, and its metrics."""

    def __init__(self) -> None:
        self.server = GrpcServer([], [SERVICE])
        self.registry = CollectorRegistry()
        self.port = free_port()

    async def get(self, path: str) -> tuple[int, str]:
        async with httpx.AsyncClient(timeout=60) as client:
            answer = await client.get(f"http://127.0.0.1:{self.port}{path}")
            return answer.status_code, answer.text


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    started = Stage()
    serve_metrics(
        started.port, "127.0.0.1", started.registry, lambda: started.server.check_ready(SERVICE)
    )
    await started.server.start("127.0.0.1:0")
    yield started
    await started.server.drain(0, 0)


async def test_probes_agree_with_health_checks(stage: Stage) -> None:
    """The process is ready exactly while the service serves, and always alive."""
    before = await stage.get("/healthz")
    stage.server.set_serving(True)
    ready = await stage.get("/healthz")
    stage.server.set_serving(False, [SERVICE])

    assert (503, f"{SERVICE} is not ready.\n") == before == await stage.get("/healthz")
    assert (200, "ok\n") == ready == await stage.get("/livez")


async def test_probes_report_a_drain_at_once(stage: Stage) -> None:
    """Calls are still served, and the process is alive."""
    stage.server.set_serving(True)
    stop_now = asyncio.Event()
    draining = asyncio.create_task(stage.server.drain(3600, 0, stop_now))
    await asyncio.sleep(0)

    assert (503, "The server is shutting down.\n") == await stage.get("/healthz")
    assert (200, "ok\n") == await stage.get("/livez")
    stop_now.set()
    await draining


async def test_a_hung_process_is_not_alive(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes reach the event loop that serves, not just the metrics' thread."""
    monkeypatch.setattr(metrics_server, "_ANSWER_SECONDS", 0.2)
    url = f"http://127.0.0.1:{stage.port}"
    for path in ("/livez", "/healthz"):
        hung = httpx.get(f"{url}{path}", timeout=60)  # noqa: ASYNC210 - hangs on purpose
        assert (503, "The process does not respond.\n") == (hung.status_code, hung.text)


async def test_any_other_path_serves_the_metrics(stage: Stage) -> None:
    """Metrics are at every path that is not a probe's."""
    Gauge("some_gauge", "Text.", registry=stage.registry)

    for path in ("/metrics", "/"):
        status, text = await stage.get(path)
        assert 200 == status
        assert "some_gauge 0.0" in text.splitlines()
