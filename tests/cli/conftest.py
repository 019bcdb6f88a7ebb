"""Fixtures for the tests of the command line."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from tests.cli.children import Children
from tests.cli.openai_script import ScriptedServer


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    """The server on a free port of the loopback interface."""
    script = ScriptedServer()
    config = uvicorn.Config(script.app(), port=0, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    started = threading.Event()
    startup = server.startup

    async def noted_startup(sockets: Any = None) -> None:
        await startup(sockets)
        script.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        started.set()

    server.startup = noted_startup  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    thread.start()
    assert started.wait(60)
    yield script
    server.should_exit = True
    thread.join()


@pytest.fixture
def children(tmp_path: Path) -> Children:
    return Children(tmp_path)
