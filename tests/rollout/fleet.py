"""Several replicas of each stage, as real processes that find each other through DNS.

All replicas of a stage have the same port, each on its own loopback address.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.name_server import NameServer
from tests.ports import free_ports
from trivium.cli.probe import is_ready

GENERATOR, TOKENIZER, FACADE = "generator_svc", "tokenizer_svc", "rest_facade"
NOTICE_SECONDS = 1.0
POLL_SECONDS = 0.05

Key = tuple[str, str]


@dataclass
class Ports:
    """Each port is used by all replicas of a stage."""

    generator: int
    generator_metrics: int
    tokenizer: int
    tokenizer_metrics: int
    facade: int


class Fleet:
    """Replicas by stage and address, and a DNS server for their names. A context manager.

    `modules` are run instead of a stage's own module.
    """

    def __init__(self, model: Path, logs: Path, modules: Mapping[str, str] | None = None) -> None:
        self.model = model
        self.names = NameServer()
        self.ports = Ports(*free_ports(5))
        self.processes: dict[Key, subprocess.Popen[bytes]] = {}
        self._logs = logs
        self._modules = modules or {}

    def __enter__(self) -> "Fleet":
        self.names.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        self.names.__exit__()

    async def start(self, stage: str, *hosts: str, **settings: object) -> None:
        """Starts replicas and waits until they are ready; they are not in DNS yet."""
        for host in hosts:
            self._spawn(stage, host, {name: str(value) for name, value in settings.items()})
        for host in hosts:
            await self.until_ready(stage, host)

    def publish(self, stage: str, *hosts: str) -> None:
        """Sets the stage's addresses in DNS."""
        self.names.names[f"{stage}.test"] = hosts

    def signal(self, stage: str, host: str, number: signal.Signals) -> None:
        self.processes[stage, host].send_signal(number)

    async def ended(self, stage: str, host: str) -> int:
        """The exit code of a replica that is stopping."""
        process = self.processes.pop((stage, host))
        return await asyncio.to_thread(process.wait, 60)

    async def kill(self, stage: str, *hosts: str) -> None:
        """kill -9."""
        for host in hosts:
            self.signal(stage, host, signal.SIGKILL)
            await self.ended(stage, host)

    def url(self, host: str) -> str:
        return f"http://{host}:{self.ports.facade}"

    async def tokens(self, stage: str, host: str) -> float:
        """How many tokens the generator or tokenizer at this address has generated or sent."""
        name = "(?:vllm:|trivium_engine_)generation_tokens_total"
        text = await self._metrics(stage, host)
        found = re.search(rf"^{name}\{{.*\}} ([0-9.e+]+)$", text, re.M)
        return float(found[1]) if found else 0.0

    async def until_known(self, stage: str, *hosts: str) -> None:
        """Returns once all callers of this stage see its replicas at these addresses as serving."""
        callers = {GENERATOR: TOKENIZER, TOKENIZER: FACADE}
        for caller, host in list(self.processes):
            if caller == callers.get(stage):
                async with asyncio.timeout(120):
                    while not set(hosts) <= await self.callees(caller, host):  # noqa: ASYNC110 - no event for it
                        await asyncio.sleep(POLL_SECONDS)

    async def callees(self, stage: str, host: str) -> set[str]:
        """The hosts of the next stage's replicas that this replica sees as serving."""
        name = r"trivium_replica_state\{.*replica=\"([^:]*):.*state=\"serving\"\} 1.0"
        return set(re.findall(name, await self._metrics(stage, host)))

    async def _metrics(self, stage: str, host: str) -> str:
        port = {
            GENERATOR: self.ports.generator_metrics,
            TOKENIZER: self.ports.tokenizer_metrics,
            FACADE: self.ports.facade,
        }[stage]
        # No TLS: loading the CA certificates would take longer than the response.
        async with httpx.AsyncClient(trust_env=False, verify=False) as client:
            return (await client.get(f"http://{host}:{port}/metrics")).text

    def _spawn(self, stage: str, host: str, settings: dict[str, str]) -> None:
        environment = {**os.environ, **self._environment(stage, host), **settings}
        with (self._logs / f"{stage}-{host}.log").open("ab") as log:
            self.processes[stage, host] = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", self._modules.get(stage, stage)],
                env=environment,
                stderr=log,
            )

    async def until_ready(self, stage: str, host: str) -> None:
        """Returns once this replica, and the stages behind it, can serve."""
        async with asyncio.timeout(120):
            while not await is_ready(self._address(stage, host)):
                process = self.processes[stage, host]
                log = self._logs / f"{stage}-{host}.log"
                assert process.poll() is None, f"{stage} at {host} ended: {log.read_text()}"
                await asyncio.sleep(POLL_SECONDS)

    def _address(self, stage: str, host: str) -> str:
        return {
            GENERATOR: f"grpc://{host}:{self.ports.generator}",
            TOKENIZER: f"grpc://{host}:{self.ports.tokenizer}/trivium.chat.v1.ChatService",
            FACADE: f"{self.url(host)}/health",
        }[stage]

    def _environment(self, stage: str, host: str) -> dict[str, str]:
        prefix = {GENERATOR: "GENERATOR", TOKENIZER: "TOKENIZER", FACADE: "FACADE"}[stage]
        ports = self.ports
        special: dict[str, object] = {
            GENERATOR: {
                "PORT": ports.generator,
                "METRICS_PORT": ports.generator_metrics,
                "MODEL_DIRECTORY": self.model,
                "DEVICE": "cpu",
                "THREADS": 1,
            },
            TOKENIZER: {
                "PORT": ports.tokenizer,
                "METRICS_PORT": ports.tokenizer_metrics,
                "MODEL_DIRECTORY": self.model,
                "GENERATOR_TARGET": self.names.target(f"{GENERATOR}.test", ports.generator),
            },
            FACADE: {
                "PORT": ports.facade,
                "TOKENIZER_TARGET": self.names.target(f"{TOKENIZER}.test", ports.tokenizer),
            },
        }[stage]
        settings = {
            "HOST": host,
            "DRAIN_NOTICE_SECONDS": NOTICE_SECONDS,
            "DRAIN_SECONDS": 30,
            **special,
        }
        return {f"TRIVIUM_{prefix}_{name}": str(value) for name, value in settings.items()}
