"""`python -m generator_svc` as a process of its own: running, refusing to start, signalled."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.ports import free_port
from trivium.generator.v1 import generator_pb2_grpc as pb_grpc
from trivium.wire.channel import open_channel

ROOT = Path(__file__).parents[2]
SERVING = health_pb2.HealthCheckResponse.SERVING


async def spawn(*prefix, **settings):
    """Starts a generator with exactly these settings.

    `prefix` is a command that replaces itself with the command in the rest of its arguments.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TRIVIUM_")}
    ours = {f"TRIVIUM_GENERATOR_{name.upper()}": str(value) for name, value in settings.items()}
    return await asyncio.create_subprocess_exec(
        *(*prefix, sys.executable, "-m", "generator_svc"),
        cwd=ROOT,
        env=clean | ours,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def refusal(*prefix, **settings):
    """Exit status and stderr of a generator that should refuse to start."""
    process = await spawn(*prefix, **({"port": 0, "metrics_port": 0, "threads": 1} | settings))
    try:
        async with asyncio.timeout(60):
            _, stderr = await process.communicate()
    except TimeoutError:
        process.kill()
        raise
    return process.returncode, stderr.decode()


class Running:
    """A running generator and clients for it."""

    def __init__(self, process, channel):
        self.process = process
        self.stub = pb_grpc.GeneratorServiceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)

    async def health(self):
        """The health of the whole process; None while it does not answer."""
        try:
            return (await self._health.Check(health_pb2.HealthCheckRequest())).status
        except grpc.aio.AioRpcError:
            return None

    async def until_health(self, wanted):
        while (found := await self.health()) != wanted:
            assert self.process.returncode is None, f"ended while its health was {found}"
            await asyncio.sleep(0.02)

    def peak_bytes(self):
        """Peak resident memory, mapped files included."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    async def ended(self):
        """Exit status and stderr, once it has ended."""
        _, stderr = await self.process.communicate()
        return self.process.returncode, stderr.decode()


@contextlib.asynccontextmanager
async def running(*prefix, **settings):
    """A generator that is ready; it is killed afterwards if it is still running."""
    port = free_port()
    process = await spawn(*prefix, port=port, **({"metrics_port": 0, "threads": 1} | settings))
    try:
        async with asyncio.timeout(60), open_channel(f"127.0.0.1:{port}") as channel:
            generator = Running(process, channel)
            await generator.until_health(SERVING)
            yield generator
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def non_log_lines(stderr):
    """The lines that are not log lines."""
    return [line for line in stderr.splitlines() if line and not re.match(r'\{"time"', line)]
