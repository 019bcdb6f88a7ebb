"""The examples against a scripted ChatService, the REST ones through the real facade."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.examples import example_runs, toolchains
from tests.examples.chat_script import MODEL, WORDS, ScriptedChat, scripted_server
from tests.ports import free_port
from trivium.cli.probe import until_ready
from trivium.cli.supervisor import Stage, Supervisor

ANSWER = "".join(WORDS)
COST = "[15 + 8 tokens, 0.250 gpu_seconds]"


@dataclass
class ScriptedPipeline:
    """Where the two doors are, and what came in."""

    chat: ScriptedChat
    target: str
    url: str = ""


@pytest.fixture
async def grpc_door() -> AsyncIterator[ScriptedPipeline]:
    """A scripted ChatService."""
    chat = ScriptedChat()
    server = scripted_server(chat)
    port = await server.start("127.0.0.1:0")
    await server.set_serving(True)
    yield ScriptedPipeline(chat, f"127.0.0.1:{port}")
    await server.drain(0, 0)


@pytest.fixture
async def rest_door(grpc_door: ScriptedPipeline) -> AsyncIterator[ScriptedPipeline]:
    """The same with the real facade before it."""
    port = free_port()
    grpc_door.url = f"http://127.0.0.1:{port}"
    settings = {
        "TRIVIUM_FACADE_PORT": str(port),
        "TRIVIUM_FACADE_TOKENIZER_TARGET": grpc_door.target,
        "TRIVIUM_FACADE_LOG_LEVEL": "warning",
    }
    command = (sys.executable, "-m", "rest_facade")
    stage = Stage("rest_facade", command, lambda: until_ready(f"{grpc_door.url}/health"), settings)
    async with Supervisor([stage], stop_seconds=30) as supervisor:
        await supervisor.wait_until_ready(60)
        yield grpc_door


async def test_python_grpc(grpc_door: ScriptedPipeline) -> None:
    """The Python example prints the streamed answer and its cost."""
    output = await example_runs.run_python_grpc(grpc_door.target)

    assert f"{ANSWER}\n{COST}\n" == output
    assert grpc_door.chat.requests[0].model == MODEL


async def test_node_grpc(grpc_door: ScriptedPipeline) -> None:
    """The Node example, which loads the .proto files, prints the same."""
    output = await example_runs.run_node_grpc(grpc_door.target)
    request = grpc_door.chat.requests[0]

    assert f"{ANSWER}\n{COST}\n" == output
    assert request.messages[0].content[0].text == "What is the capital of France?"
    assert request.options.sampling.HasField("temperature")
    assert request.options.sampling.temperature == 0


@pytest.mark.parametrize("language", ["go", "java"])
async def test_compiled_languages(
    grpc_door: ScriptedPipeline, language: str, tmp_path: Path
) -> None:
    """The Go and the Java example, with stubs that buf generates, print the same."""
    toolchains.require(language)
    example = await asyncio.to_thread(toolchains.generate_by_buf, language, tmp_path)
    command = await asyncio.to_thread(toolchains.build, language, example, tmp_path)
    output = await example_runs.run(command, grpc_door.target)
    request = grpc_door.chat.requests[0]

    assert f"{ANSWER}\n{COST}\n" == output
    assert request.messages[0].content[0].text == "What is the capital of France?"
    assert request.options.sampling.HasField("temperature")


@pytest.mark.parametrize("language", ["go", "java"])
def test_protoc_generates_what_buf_does(language: str, tmp_path: Path) -> None:
    """A team may take either: the packages, types and functions are the same."""
    toolchains.require(language)
    (tmp_path / "buf").mkdir()
    (tmp_path / "protoc").mkdir()
    by_buf = toolchains.declarations(toolchains.generate_by_buf(language, tmp_path / "buf"))
    by_protoc = toolchains.declarations(
        toolchains.generate_by_protoc(language, tmp_path / "protoc")
    )

    assert len(by_protoc) >= 5
    assert [] == [name for name, found in by_protoc.items() if not found]
    assert by_protoc == {name: by_buf[name] for name in by_protoc}


async def test_python_openai(rest_door: ScriptedPipeline) -> None:
    """OpenAI's client prints the same through the facade."""
    output = await example_runs.run_python_openai(rest_door.url)

    assert f"{ANSWER}\n{COST}\n" == output


async def test_curl(rest_door: ScriptedPipeline) -> None:
    """curl shows the whole answer as JSON, with its usage."""
    body = json.loads(await example_runs.run_curl(rest_door.url, MODEL))

    assert body["choices"][0]["message"]["content"] == ANSWER
    assert body["usage"]["gpu_seconds"] == 0.25


def test_each_example_is_one_screen() -> None:
    """An example that does not fit on a screen is not read."""
    kinds = (".py", ".mjs", ".go", ".java")
    files = [path for path in example_runs.EXAMPLES.rglob("*") if path.suffix in kinds]

    assert len(files) == 5
    assert [] == [path.name for path in files if len(path.read_text().splitlines()) > 50]


def test_curl_fails_where_nobody_listens(unused_tcp_port: int) -> None:
    """The shell example's status tells that there was no answer."""
    url = f"http://127.0.0.1:{unused_tcp_port}"
    command = ["sh", str(example_runs.EXAMPLES / "curl.sh"), url]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))

    assert done.returncode != 0
    assert done.stdout == ""
