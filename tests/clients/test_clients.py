"""Third-party clients, each with a small script, against the three real services.

The embedded model was not trained for tools; forced calls and schemas are valid all the same,
because the grammar allows nothing else.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import node
from tests.pipeline.services import Services
from trivium.cli.models import find_model
from trivium.embedded_model import EMBEDDED_MODEL

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """The three services on the embedded model, which is exported if it is missing."""
    model = find_model(EMBEDDED_MODEL, "auto").folder
    with Services(model, tmp_path_factory.mktemp("services")) as services:
        yield services


def run(program: str | Path, script: Path, services: Services) -> None:
    """Runs a client's script to the end."""
    command = [str(program), str(script), f"{services.url}/v1", EMBEDDED_MODEL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)

    assert 0 == done.returncode, done.stdout + done.stderr
    assert done.stdout.endswith("all is well\n")


def test_official_node_client(services: Services) -> None:
    """npm's `openai`: chat, streams, tools and their results, zod schemas, completions, errors."""
    run(node.executable(), node.beside_packages(HERE / "openai_node.mjs"), services)


def test_vercel_ai_sdk(services: Services) -> None:
    """npm's `ai` with `@ai-sdk/openai-compatible`: text, tools in two steps, objects, errors."""
    run(node.executable(), node.beside_packages(HERE / "ai_sdk.mjs"), services)


def test_langchain(services: Services) -> None:
    """PyPI's `langchain-openai`: both methods of with_structured_output, tools, streamed calls."""
    run(sys.executable, HERE / "langchain_script.py", services)


def test_openai_agents(services: Services) -> None:
    """PyPI's `openai-agents`: tools that it executes, streaming too, typed answers, handoffs."""
    run(sys.executable, HERE / "agents_script.py", services)


def test_outlines(services: Services) -> None:
    """PyPI's `outlines`: the constraints of vLLM and SGLang, and OpenAI's."""
    run(sys.executable, HERE / "outlines_script.py", services)


def test_hugging_face(services: Services) -> None:
    """PyPI's `huggingface-hub`: TGI's dialect of schemas and tool choices."""
    run(sys.executable, HERE / "hugging_face_script.py", services)
