"""The process around the application: it listens, and at a stop signal it drains."""

import asyncio
import contextlib
from collections.abc import Iterator

import uvicorn

from rest_facade.app import build_app
from rest_facade.auth import KeyFile
from rest_facade.backend import Backend
from rest_facade.config import FacadeSettings
from rest_facade.edge import EdgeProtocol
from rest_facade.traffic import Traffic
from trivium.wire.channel import open_channel
from trivium.wire.serving import wait_for_signal

_BACKLOG = 65_535  # connections to be taken; the system's own bound (somaxconn) is what counts
_LAST_WORDS_SECONDS = 5  # to write the error events of streams that were cut off


class _Server(uvicorn.Server):
    """uvicorn, but signals are ours: its own handling closes the port at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(settings: FacadeSettings, keys: KeyFile | None) -> None:
    """Serves until a stop signal, then drains; raises SystemExit when the port is taken."""
    traffic = Traffic()
    async with open_channel(settings.tokenizer_target) as channel:
        backend = Backend(channel, settings.request_timeout_seconds)
        server = _Server(
            uvicorn.Config(
                build_app(settings, backend, traffic, keys),
                host=settings.host,
                port=settings.port,
                http=EdgeProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=settings.idle_connection_seconds,
                timeout_graceful_shutdown=_LAST_WORDS_SECONDS,
            )
        )
        stopper = asyncio.create_task(_stop_at_signal(settings, server, traffic, backend))
        try:
            await server.serve()
        finally:
            stopper.cancel()


async def _stop_at_signal(
    settings: FacadeSettings, server: uvicorn.Server, traffic: Traffic, backend: Backend
) -> None:
    await wait_for_signal()
    # The port stays open meanwhile, so that newcomers hear why they are refused.
    traffic.draining = True
    await asyncio.sleep(settings.drain_notice_seconds)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(settings.drain_seconds):
            await traffic.until_idle()
    backend.cancel_all()
    server.should_exit = True
