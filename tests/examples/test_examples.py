"""The examples against a scripted ChatService, the REST ones through the real facade."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from tests.examples import example_runs
from tests.examples.chat_script import MODEL, WORDS, ScriptedChat, scripted_server
from trivium.cli.pipeline import free_ports
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
    (port,) = free_ports(1)
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
    files = [path for path in example_runs.EXAMPLES.rglob("*") if path.suffix in (".py", ".mjs")]

    assert len(files) == 3
    assert [] == [path.name for path in files if len(path.read_text().splitlines()) > 50]


def test_curl_fails_where_nobody_listens(unused_tcp_port: int) -> None:
    """The shell example's status tells that there was no answer."""
    url = f"http://127.0.0.1:{unused_tcp_port}"
    command = ["sh", str(example_runs.EXAMPLES / "curl.sh"), url]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))

    assert done.returncode != 0
    assert done.stdout == ""
