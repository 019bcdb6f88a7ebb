"""The facade on a real server, in front of a scripted next stage."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from rest_facade.app import build_app
from rest_facade.backend import Backend
from rest_facade.config import FacadeSettings
from rest_facade.http_limits import LimitedHttpProtocol
from rest_facade.metrics import Metrics
from tests.openai_shapes import watched
from tests.rest_facade.scripted_backend import ScriptedBackend
from trivium.keys.key_file import KeyFile
from trivium.keys.settings import open_limits
from trivium.usage_log import UsageLog
from trivium.wire.in_flight import InFlight

StartFacade = Callable[..., Any]


@pytest.fixture(autouse=True)
def openai_shapes() -> Iterator[None]:
    """Everything a test receives has OpenAI's shapes, or the test fails."""
    with watched():
        yield


@pytest.fixture
async def backend() -> AsyncIterator[ScriptedBackend]:
    """A running scripted next stage."""
    scripted = ScriptedBackend()
    await scripted.start()
    yield scripted
    await scripted.die()


@pytest.fixture
async def start_facade(backend: ScriptedBackend) -> AsyncIterator[StartFacade]:
    """Starts a facade with the given settings on a free port; returns a client for it."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**settings: Any) -> httpx.AsyncClient:
            url = await stack.enter_async_context(facade(backend.port, settings))
            # No TLS: loading the CA certificates would take as long as most tests.
            client = httpx.AsyncClient(base_url=url, timeout=30, trust_env=False, verify=False)
            return await stack.enter_async_context(client)

        yield start


@pytest.fixture
async def client(start_facade: StartFacade) -> httpx.AsyncClient:
    """A client for a facade with default settings."""
    started: httpx.AsyncClient = await start_facade()
    return started


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@contextlib.asynccontextmanager
async def facade(backend_port: int, values: dict[str, Any]) -> AsyncIterator[str]:
    """Serves with these settings in front of a stage on the given port; yields the URL."""
    settings = FacadeSettings(tokenizer_target=f"127.0.0.1:{backend_port}", **values)
    keys = KeyFile(settings.api_keys_file) if settings.api_keys_file else None
    log = UsageLog(settings.usage_log, settings.log_name, settings.usage_log_max_bytes, 2)
    async with Backend(settings.tokenizer_target, settings.request_timeout_seconds) as stage:
        metrics = Metrics()
        limits = open_limits("LIMITS_URL", settings.limits_url, metrics.registry)
        config = uvicorn.Config(
            build_app(settings, stage, InFlight(), keys, metrics, log, limits),
            port=0,
            http=LimitedHttpProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            timeout_keep_alive=settings.idle_connection_seconds,
            timeout_graceful_shutdown=1,
        )
        server = _Server(config)
        serving = asyncio.create_task(server.serve())
        await server.listening.wait()
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        await serving
        await limits.close()
        log.close()
