"""The three services as stages of a supervisor: their commands, addresses and environment.

Knows the names of the services' settings, and nothing else of the services.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trivium.cli.probe import until_ready
from trivium.cli.supervisor import Stage

ANY_HOST = ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not bound to
LOOPBACK = "127.0.0.1"
# Names under which health tells that a stage and those behind it can serve.
CHAT, GENERATOR = "trivium.chat.v1.ChatService", "trivium.generator.v1.GeneratorService"

# glibc's allocator then asks for huge pages, which is where the weights are: a step reads all of
# them, and one sequence decodes a seventh faster (docs/log.md).
TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"

MEMORY_SHARE = 0.5  # of free memory, for the keys and values of all models together


class PortTaken(Exception):
    """A port that a stage needs cannot be bound; the text names it and its setting."""


@dataclass(frozen=True)
class Pipeline:
    """Where the services of one machine listen, and the models they serve.

    Each of `more_models` has a generator of its own, on the ports that follow the first one's.
    """

    model: Path
    device: str = "auto"
    host: str = LOOPBACK
    port: int = 8000
    grpc_host: str = LOOPBACK
    tokenizer_port: int = 50051
    tokenizer_metrics_port: int = 9051
    generator_port: int = 50052
    generator_metrics_port: int = 9052
    log_level: str = "warning"
    drain_seconds: float = 30.0
    more_models: tuple[Path, ...] = ()

    @property
    def models(self) -> tuple[Path, ...]:
        """All models, the first first."""
        return (self.model, *self.more_models)

    @property
    def url(self) -> str:
        """Base URL of the REST API, reachable from this machine."""
        return f"http://{authority(self.host, self.port)}"

    @property
    def chat_target(self) -> str:
        """Where the ChatService is reached from this machine."""
        return authority(self.grpc_host, self.tokenizer_port)

    @property
    def generator_targets(self) -> list[str]:
        """Where the generators are reached from this machine, one for each model."""
        return [
            authority(LOOPBACK, self.generator_port + number) for number in range(len(self.models))
        ]

    @property
    def generator_target(self) -> str:
        """Where the first model's generator is reached from this machine."""
        return self.generator_targets[0]

    def stages(self) -> list[Stage]:
        """Back to front, as the supervisor wants them."""
        generators = [
            _stage("generator_svc", f"grpc://{target}/{GENERATOR}", self._generator(number), number)
            for number, target in enumerate(self.generator_targets)
        ]
        return [
            *generators,
            _stage("tokenizer_svc", f"grpc://{self.chat_target}/{CHAT}", self._tokenizer()),
            _stage("rest_facade", f"{self.url}/health", self._facade()),
        ]

    def check_ports(self) -> None:
        """Raises PortTaken for the first port that somebody else holds."""
        for host, port, option in self._listeners():
            try:
                bind(host, port).close()
            except OSError as error:
                raise PortTaken(
                    f"port {port} on {host} cannot be bound ({error.strerror}); "
                    f"stop what uses it, or choose another with {option}"
                ) from error

    def _listeners(self) -> Iterator[tuple[str, int, str]]:
        yield self.host, self.port, "--port"
        yield self.grpc_host, self.tokenizer_port, "--tokenizer-port"
        yield self.grpc_host, self.tokenizer_metrics_port, "--tokenizer-metrics-port"
        for number in range(len(self.models)):
            yield LOOPBACK, self.generator_port + number, "--generator-port"
            metrics_port = self.generator_metrics_port and self.generator_metrics_port + number
            yield LOOPBACK, metrics_port, "--generator-metrics-port"

    def _generator(self, number: int) -> dict[str, str]:
        metrics_port = self.generator_metrics_port and self.generator_metrics_port + number
        return {
            "TRIVIUM_GENERATOR_HOST": LOOPBACK,
            "TRIVIUM_GENERATOR_PORT": str(self.generator_port + number),
            "TRIVIUM_GENERATOR_METRICS_PORT": str(metrics_port),
            "TRIVIUM_GENERATOR_MODEL_DIRECTORY": str(self.models[number]),
            **self._memory(),
            **huge_pages(),
            "TRIVIUM_GENERATOR_DEVICE": self.device,
            "TRIVIUM_GENERATOR_LOG_LEVEL": self.log_level,
            "TRIVIUM_GENERATOR_DRAIN_SECONDS": str(self.drain_seconds),
            **_no_notice("GENERATOR"),
        }

    def _memory(self) -> dict[str, str]:
        """What each of several generators may take, as none of them knows of the others."""
        setting = "TRIVIUM_GENERATOR_KV_MEMORY_SHARE"
        if len(self.models) == 1 or setting in os.environ:
            return {}
        return {setting: str(round(MEMORY_SHARE / len(self.models), 3))}

    def _served(self) -> dict[str, str]:
        """The models, as the tokenizer's settings say it."""
        if len(self.models) == 1:
            return {
                "TRIVIUM_TOKENIZER_GENERATOR_TARGET": self.generator_target,
                "TRIVIUM_TOKENIZER_MODEL_DIRECTORY": str(self.model),
            }
        served = [
            {"model_directory": str(model), "generator_target": target}
            for model, target in zip(self.models, self.generator_targets, strict=True)
        ]
        return {"TRIVIUM_TOKENIZER_MODELS": json.dumps(served)}

    def _tokenizer(self) -> dict[str, str]:
        return {
            **self._served(),
            "TRIVIUM_TOKENIZER_HOST": self.grpc_host,
            "TRIVIUM_TOKENIZER_PORT": str(self.tokenizer_port),
            "TRIVIUM_TOKENIZER_METRICS_PORT": str(self.tokenizer_metrics_port),
            "TRIVIUM_TOKENIZER_LOG_LEVEL": self.log_level,
            "TRIVIUM_TOKENIZER_DRAIN_SECONDS": str(self.drain_seconds),
            **_no_notice("TOKENIZER"),
        }

    def _facade(self) -> dict[str, str]:
        return {
            "TRIVIUM_FACADE_HOST": self.host,
            "TRIVIUM_FACADE_PORT": str(self.port),
            "TRIVIUM_FACADE_TOKENIZER_TARGET": self.chat_target,
            "TRIVIUM_FACADE_LOG_LEVEL": self.log_level,
            "TRIVIUM_FACADE_DRAIN_SECONDS": str(self.drain_seconds),
            **_no_notice("FACADE"),
        }


def _no_notice(service: str) -> dict[str, str]:
    """No load balancer has to notice that a stage here stops, unless its owner says so."""
    setting = f"TRIVIUM_{service}_DRAIN_NOTICE_SECONDS"
    return {} if setting in os.environ else {setting: "0.0"}


def huge_pages() -> dict[str, str]:
    """What a generator's environment lacks for weights in huge pages; its owner's word counts."""
    return {} if TUNABLES in os.environ else {TUNABLES: HUGE_PAGES}


def authority(host: str, port: int) -> str:
    """`host:port` by which this machine reaches a server bound to `host`."""
    host = LOOPBACK if host in ANY_HOST else host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(host: str, port: int) -> socket.socket:
    """A socket bound as a server would bind it; port 0 takes any free one. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that were free a moment ago, all different."""
    listeners = [bind(LOOPBACK, 0) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _stage(name: str, address: str, environment: dict[str, str], number: int = 0) -> Stage:
    command = (sys.executable, "-m", name)
    ready = functools.partial(until_ready, address)
    return Stage(f"{name}-{number + 1}" if number else name, command, ready, environment)
