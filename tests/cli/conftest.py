"""Fixtures for the tests of the command line."""

import json
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
    """A scripted server on a free port of the loopback interface."""
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


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A folder that passes for a model as long as it is not run."""
    return fake_model_folder(tmp_path / "model")


def fake_model_folder(folder: Path, token_bytes: int = 64, context_length: int = 64) -> Path:
    """Makes a folder that passes for a model with `token_bytes` of KV cache per token."""
    decoder = {
        "filename": "model.onnx",
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_size": token_bytes // 8,
        "hidden_size": 8,
        "inputs": {},
        "outputs": {},
    }
    folder.mkdir()
    model = {"decoder": decoder, "context_length": context_length, "vocab_size": 10}
    (folder / "genai_config.json").write_text(json.dumps({"model": model}))
    for name in ("tokenizer.json", "tokenizer_config.json", "model.onnx"):
        (folder / name).write_text("{}")
    return folder
