"""The three services as stages for the supervisor: their commands, addresses and environment.

Knows the names of the services' settings, and nothing else about the services.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trivium.cli.probe import fault, until_ready
from trivium.cli.stage_tls import StageTls
from trivium.cli.supervisor import Stage
from trivium.wire.listening import address_of, bind, bind_error_message
from trivium.wire.tls.channel import ChannelTls

ANY_HOST = {"", "0.0.0.0", "::"}  # noqa: S104 - compared with, not bound to
LOOPBACK = "127.0.0.1"
# Health service names that report whether a stage and those behind it can serve.
CHAT, GENERATOR = "trivium.chat.v1.ChatService", "trivium.generator.v1.GeneratorService"

# glibc's allocator then puts the weights in huge pages. As a step reads all of them, one sequence
# decodes a seventh faster (docs/log.md).
TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"

# Replicas of a stage listen this far apart, which leaves the ports of other stages free.
PORT_STRIDE = 100
FIRST_METRICS_PORT = 9050  # with several facades, which share one port for all else
HIGHEST_PORT = 65535

MEMORY_SHARE = 0.5  # of free memory, for the KV caches of all models together

# Defaults if neither the command line nor the environment sets them.
LOG_LEVEL = "warning"
DRAIN_SECONDS = 30.0
# No load balancer needs to notice that a local stage stops.
DRAIN_NOTICE_SECONDS = 0.0

# Settings that must match the local stages, and the option that changes each.
_MANAGED_SETTINGS = {
    "TRIVIUM_FACADE_REUSE_PORT": "--facades",
    "TRIVIUM_FACADE_TOKENIZER_TARGET": "--tokenizer-port",
    "TRIVIUM_TOKENIZER_GENERATOR_TARGET": "--generator-port",
    "TRIVIUM_TOKENIZER_MODELS": "--model once per model",
    "TRIVIUM_TOKENIZER_MODEL_DIRECTORY": "--model",
}


class SettingConflict(Exception):
    """Environment variables contradict the local stages; the message names them."""


class PortTaken(Exception):
    """A port that a stage needs cannot be bound; the message names it and its setting."""


@dataclass(frozen=True)
class Pipeline:
    """Where the services of one machine listen, and the models they serve.

    Each of `more_models` has its own generator, on the ports that follow the first one's.
    `aliases` are further names that requests may use, one or None per model. Tokenizers listen
    PORT_STRIDE apart, and facades share their port. None leaves a setting to each service's own
    variable.
    """

    model: Path
    device: str = "auto"
    host: str = LOOPBACK
    port: int = 8000
    grpc_host: str = LOOPBACK
    tokenizer_port: int = 50051
    tokenizer_metrics_port: int = 9051
    generator_host: str = LOOPBACK
    generator_port: int = 50052
    generator_metrics_port: int = 9052
    log_level: str | None = None
    drain_seconds: float | None = None
    more_models: tuple[Path, ...] = ()
    aliases: tuple[str | None, ...] = ()
    tokenizers: int = 1
    facades: int = 1
    facade_metrics_port: int = 0
    tls: StageTls = field(default_factory=StageTls)

    @property
    def models(self) -> tuple[Path, ...]:
        """All models, beginning with `model`."""
        return (self.model, *self.more_models)

    @property
    def url(self) -> str:
        """Base URL of the REST API, reachable from this machine."""
        return f"{self._scheme}://{authority(self.host, self.port)}"

    @property
    def chat_targets(self) -> list[str]:
        """Addresses of the tokenizers, as reached from this machine."""
        ports = _ports(self.tokenizer_port, self.tokenizers)
        return [authority(self.grpc_host, port) for port in ports]

    @property
    def chat_target(self) -> str:
        """All of them, as written in a facade's setting."""
        return ",".join(self.chat_targets)

    @property
    def facade_metrics_urls(self) -> list[str]:
        """The metrics URL of each facade."""
        own = [f"{url}/metrics" for url in self._facade_metrics_servers()]
        return own or [f"{self.url}/metrics"]

    @property
    def generator_targets(self) -> list[str]:
        """Addresses of the generators, as reached from this machine, one per model."""
        return [
            authority(self.generator_host, self.generator_port + number)
            for number in range(len(self.models))
        ]

    @property
    def generator_target(self) -> str:
        """Address of the first model's generator, as reached from this machine."""
        return self.generator_targets[0]

    def stages(self) -> list[Stage]:
        """The stages, back to front, as the supervisor expects them."""
        generators = [
            ([f"grpc://{target}/{GENERATOR}"], self._generator(number))
            for number, target in enumerate(self.generator_targets)
        ]
        tokenizers = [
            ([f"grpc://{target}/{CHAT}"], self._tokenizer(number))
            for number, target in enumerate(self.chat_targets)
        ]
        # Any facade may answer at the shared port, so each is probed at its own metrics port too;
        # only there, if the shared port requires a client certificate.
        own = [f"{url}/healthz" for url in self._facade_metrics_servers()]
        shared = [] if self.tls.is_mutual else [f"{self.url}/health"]
        facades = [
            ([*own[number : number + 1], *shared], self._facade(number))
            for number in range(self.facades)
        ]
        return [
            *_replicas("generator_svc", "GENERATOR", generators, self.tls.generator),
            *_replicas("tokenizer_svc", "TOKENIZER", tokenizers, self.tls.chat),
            *_replicas("rest_facade", "FACADE", facades),
        ]

    def check_environment(self) -> None:
        """Raises SettingConflict for a variable that contradicts what is decided here."""
        needed = [item for stage in self.stages() for item in stage.environment.items()]
        for setting, value in needed:
            found = os.environ.get(setting)
            # A folder may be given as a relative path.
            if (
                found
                and setting in _MANAGED_SETTINGS
                and value not in (found, os.path.abspath(found))
            ):
                raise SettingConflict(
                    f"{setting} is {found}, which conflicts with `trivium up`; unset it, and use "
                    f"{_MANAGED_SETTINGS[setting]}"
                )

    def check_ports(self) -> None:
        """Raises PortTaken for the first port that another process or stage uses."""
        ours: list[tuple[str, int, str]] = []
        for host, port, setting, option in self._listeners():
            if port > HIGHEST_PORT:
                raise PortTaken(
                    f"port {port} is above the highest one, {HIGHEST_PORT}; choose a lower port "
                    f"with {option}"
                )
            for other_host, other_port, other in ours:
                if port == other_port != 0 and (
                    host == other_host or {host, other_host} & ANY_HOST
                ):
                    raise PortTaken(
                        f"{setting}: {address_of(host, port)} is in use by {other}; choose "
                        f"another port with {option}"
                    )
            ours.append((host, port, setting))
            try:
                bind(host, port).close()
            except OSError as error:
                reason = bind_error_message(host, port, error)
                raise PortTaken(
                    f"{setting}: {reason}; stop the process that uses it, or choose another port "
                    f"with {option}"
                ) from error

    def _listeners(self) -> Iterator[tuple[str, int, str, str]]:
        """Host and port of each listener, the variable that sets the port, and the option."""
        yield self.host, self.port, "TRIVIUM_FACADE_PORT", "--port"
        for port in self._facade_metrics_ports():
            yield self.host, port, "TRIVIUM_FACADE_METRICS_PORT", "--facade-metrics-port"
        host, prefix, option = self.grpc_host, "TRIVIUM_TOKENIZER_", "--tokenizer-"
        for port in _ports(self.tokenizer_port, self.tokenizers):
            yield host, port, f"{prefix}PORT", f"{option}port"
        for port in _ports(self.tokenizer_metrics_port, self.tokenizers):
            yield host, port, f"{prefix}METRICS_PORT", f"{option}metrics-port"
        host, prefix, option = self.generator_host, "TRIVIUM_GENERATOR_", "--generator-"
        for number in range(len(self.models)):
            yield host, self.generator_port + number, f"{prefix}PORT", f"{option}port"
            metrics_port = self.generator_metrics_port and self.generator_metrics_port + number
            yield host, metrics_port, f"{prefix}METRICS_PORT", f"{option}metrics-port"

    def _generator(self, number: int) -> dict[str, str]:
        metrics_port = self.generator_metrics_port and self.generator_metrics_port + number
        return {
            "TRIVIUM_GENERATOR_HOST": self.generator_host,
            "TRIVIUM_GENERATOR_PORT": str(self.generator_port + number),
            "TRIVIUM_GENERATOR_METRICS_PORT": str(metrics_port),
            "TRIVIUM_GENERATOR_MODEL_DIRECTORY": str(self.models[number]),
            **self._memory_settings(),
            **huge_pages(),
            "TRIVIUM_GENERATOR_DEVICE": self.device,
            **self._common_settings("GENERATOR"),
        }

    def _memory_settings(self) -> dict[str, str]:
        """Each generator's share of memory, as generators do not know about each other."""
        if len(self.models) == 1:
            return {}
        share = round(MEMORY_SHARE / len(self.models), 3)
        return _default("TRIVIUM_GENERATOR_KV_MEMORY_SHARE", share)

    def _model_settings(self) -> dict[str, str]:
        """The tokenizer's settings for the models; those not needed are set to empty."""
        if len(self.models) == 1 and not any(self.aliases):
            return {
                "TRIVIUM_TOKENIZER_GENERATOR_TARGET": self.generator_target,
                "TRIVIUM_TOKENIZER_MODEL_DIRECTORY": str(self.model),
                "TRIVIUM_TOKENIZER_MODELS": "",
            }
        aliases = self.aliases or (None,) * len(self.models)
        served = [
            {"model_directory": str(model), "generator_target": target}
            | ({"aliases": [alias]} if alias else {})
            for model, target, alias in zip(
                self.models, self.generator_targets, aliases, strict=True
            )
        ]
        return {
            "TRIVIUM_TOKENIZER_GENERATOR_TARGET": "",
            "TRIVIUM_TOKENIZER_MODEL_DIRECTORY": "",
            "TRIVIUM_TOKENIZER_MODELS": json.dumps(served),
        }

    @property
    def _scheme(self) -> str:
        return "http" if self.tls.certificate is None else "https"

    def _facade_metrics_servers(self) -> list[str]:
        """Base URLs of the facades' separate metrics servers."""
        ports = self._facade_metrics_ports()
        return [f"http://{authority(self.host, port)}" for port in ports]

    def _facade_metrics_ports(self) -> list[int]:
        """Empty for a single facade that has its metrics on the port of the REST API."""
        if self.facades == 1 and not self.facade_metrics_port:
            return []
        return _ports(self.facade_metrics_port or FIRST_METRICS_PORT, self.facades)

    def _tokenizer(self, number: int) -> dict[str, str]:
        return {
            **self._model_settings(),
            "TRIVIUM_TOKENIZER_HOST": self.grpc_host,
            "TRIVIUM_TOKENIZER_PORT": str(_port(self.tokenizer_port, number)),
            "TRIVIUM_TOKENIZER_METRICS_PORT": str(_port(self.tokenizer_metrics_port, number)),
            **self._common_settings("TOKENIZER"),
        }

    def _facade(self, number: int) -> dict[str, str]:
        metrics_ports = self._facade_metrics_ports() or [0]
        return {
            "TRIVIUM_FACADE_HOST": self.host,
            "TRIVIUM_FACADE_PORT": str(self.port),
            "TRIVIUM_FACADE_REUSE_PORT": str(self.facades > 1),
            "TRIVIUM_FACADE_METRICS_PORT": str(metrics_ports[number]),
            "TRIVIUM_FACADE_TOKENIZER_TARGET": self.chat_target,
            **self._common_settings("FACADE"),
        }

    def _common_settings(self, service: str) -> dict[str, str]:
        """The settings that all services share, with the names they have in this one."""
        return {
            **_default(f"TRIVIUM_{service}_LOG_LEVEL", LOG_LEVEL, self.log_level),
            **_default(f"TRIVIUM_{service}_DRAIN_SECONDS", DRAIN_SECONDS, self.drain_seconds),
            **_default(f"TRIVIUM_{service}_DRAIN_NOTICE_SECONDS", DRAIN_NOTICE_SECONDS),
        }


def _port(first: int, number: int) -> int:
    """The port of replica `number` of a stage; 0 (none) if the first one has none."""
    return first and first + number * PORT_STRIDE


def _ports(first: int, count: int) -> list[int]:
    return [_port(first, number) for number in range(count)]


def _default(setting: str, default: object, given: object = None) -> dict[str, str]:
    """A setting by precedence: the command line, the environment (left as it is), the default."""
    if given is None and os.environ.get(setting):
        return {}
    return {setting: str(default if given is None else given)}


def huge_pages() -> dict[str, str]:
    """The variable that puts a generator's weights in huge pages, unless the user has set it."""
    return {} if TUNABLES in os.environ else {TUNABLES: HUGE_PAGES}


def authority(host: str, port: int) -> str:
    """The `host:port` at which this machine reaches a server bound to `host`."""
    return address_of(LOOPBACK if host in ANY_HOST else host, port)


def _replicas(
    service: str,
    settings: str,
    replicas: Sequence[tuple[Sequence[str], dict[str, str]]],
    tls: ChannelTls | None = None,
) -> Iterator[Stage]:
    """A stage per pair of addresses to probe and environment; numbered if there are several."""
    command = (sys.executable, "-m", service)
    log_name = f"TRIVIUM_{settings}_LOG_NAME"
    base_name = os.environ.get(log_name) or service
    for number, (addresses, environment) in enumerate(replicas, start=1):
        suffix = "" if len(replicas) == 1 else f"-{number}"
        ready = functools.partial(until_ready, *addresses, tls=tls)
        why_not = functools.partial(fault, *_probes(settings, environment), *addresses, tls=tls)
        named = {**environment, log_name: f"{base_name}{suffix}"}
        yield Stage(f"{service}{suffix}", command, ready, named, why_not)


def _probes(settings: str, environment: Mapping[str, str]) -> list[str]:
    """Where a stage says in words why it is not ready, which gRPC's health service cannot; empty
    without a metrics port."""
    host, port = (environment[f"TRIVIUM_{settings}_{name}"] for name in ("HOST", "METRICS_PORT"))
    return [] if port == "0" else [f"http://{authority(host, int(port))}/healthz"]
