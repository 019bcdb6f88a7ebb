"""Runs the examples as a reader would: each as a process that is given only an address.

Every function takes the address, so that it works with scripted and real servers.
"""

import asyncio
import os
import sys
from pathlib import Path

from tests import node

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NODE_EXAMPLE = EXAMPLES / "node_grpc"


async def run_python_grpc(target: str) -> str:
    """What examples/python_grpc.py prints for the server at `target` (host:port)."""
    return await _output([sys.executable, str(EXAMPLES / "python_grpc.py"), target])


async def run_python_openai(url: str) -> str:
    """What examples/python_openai.py prints for the server at `url`."""
    return await _output([sys.executable, str(EXAMPLES / "python_openai.py"), url])


async def run_curl(url: str, model: str) -> str:
    """What examples/curl.sh prints for the server at `url`."""
    return await _output(["sh", str(EXAMPLES / "curl.sh"), url, model])


async def run_node_grpc(target: str) -> str:
    """What examples/node_grpc/chat.mjs prints for the server at `target` (host:port)."""
    script = await asyncio.to_thread(node.beside_packages, NODE_EXAMPLE / "chat.mjs")
    protos = {"TRIVIUM_PROTOS": str(ROOT / "protos")}
    return await _output([str(node.executable()), str(script), target], protos)


async def run(command: list[str], target: str) -> str:
    """What the example that `command` starts prints for the server at `target` (host:port)."""
    return await _output([*command, target])


async def _output(command: list[str], environment: dict[str, str] | None = None) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONWARNINGS": "error", **(environment or {})},
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, f"{output.decode()}{errors.decode()}"
    return output.decode()
