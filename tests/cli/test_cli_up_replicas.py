"""`trivium up` with several facades and tokenizers: real processes on a tiny model."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cli.children import is_running
from tests.ports import free_port, free_ports
from tests.tiny_models import tiny_model_directory
from trivium.cli.pipeline import PORT_STRIDE
from trivium.wire.listening import bind

pytestmark = pytest.mark.pipeline

REQUESTS = 40  # all of them reach one of the two facades only once in 10^12
SMALL = {"TRIVIUM_GENERATOR_SLOTS": "4", "TRIVIUM_GENERATOR_MAX_SEQUENCE_LENGTH": "512"}


@dataclass(frozen=True)
class Up:
    """The running command: its process, the services' process ids by name, banner and log."""

    process: subprocess.Popen[str]
    pids: dict[str, int]
    banner: str
    log: Path

    @property
    def url(self) -> str:
        return self._matches(r"REST +(\S+)")[0]

    @property
    def metrics(self) -> list[str]:
        """Addresses of the facades' metrics."""
        return re.findall(r"http://\S+?/metrics", self.banner)

    def _matches(self, pattern: str) -> list[str]:
        return re.findall(pattern, self.banner)


def free_pair() -> int:
    """A port that is free, as is the one for a second replica."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError, OverflowError), bind("127.0.0.1", port + PORT_STRIDE):
            return port


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    """Two facades and two tokenizers in front of one generator."""
    pairs = ("facade-metrics-port", "tokenizer-port", "tokenizer-metrics-port")
    ports = {name: free_pair() for name in pairs}
    ports |= zip(("port", "generator-port", "generator-metrics-port"), free_ports(3), strict=True)
    options = [f"--{name}={port}" for name, port in ports.items()]
    model = f"--model={tiny_model_directory('llama')}"
    command = [sys.executable, "-m", "trivium.cli", "up", "--facades=2", "--tokenizers=2", model]
    log = tmp_path / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [*command, *options, "--log-level=info"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **SMALL},
        ) as process,
    ):
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "print(answer.choices[0].message.content)\n")
        banner = "".join(line for line in lines if line or pytest.fail(log.read_text()))
        yield Up(process, services(process.pid), banner, log)
        process.kill()


def services(pid: int) -> dict[str, int]:
    """The process ids of the services, by their names in the log."""
    named = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_text().split("\0")
        [name] = [value for value in environment if re.match(r"TRIVIUM_\w+_LOG_NAME=", value)]
        named[name.partition("=")[2]] = int(child)
    return named


def counted(url: str, metric: str, **labels: str) -> dict[tuple[str, ...], float]:
    """The samples of a metric at a /metrics URL, by the values of its other labels."""
    found = {}
    text = httpx.get(url, trust_env=False).raise_for_status().text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == metric and labels.items() <= sample.labels.items():
                rest = sorted(sample.labels.keys() - labels.keys())
                found[tuple(sample.labels[name] for name in rest)] = sample.value
    return found


def ask(url: str) -> httpx.Response:
    """One answer, on a connection of its own."""
    model = httpx.get(f"{url}/models", trust_env=False).json()["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    return httpx.post(f"{url}/chat/completions", json=body, timeout=60, trust_env=False)


def test_replicas_share_the_load_and_ctrl_c_stops_all(up: Up) -> None:
    """Connections are spread over the facades, calls over the tokenizers; one SIGINT ends all."""
    answers = [ask(up.url).status_code for _ in range(REQUESTS)]
    route = "/v1/chat/completions"
    asked = [
        counted(url, "trivium_http_requests_total", route=route, status="200") for url in up.metrics
    ]
    picked = [counted(url, "trivium_replica_picked_total", model_name="") for url in up.metrics]
    shared = httpx.get(up.url.removesuffix("/v1") + "/metrics", trust_env=False)
    up.process.send_signal(signal.SIGINT)
    status = up.process.wait()

    assert [200] * REQUESTS == answers
    assert 2 == len(asked)
    assert REQUESTS == sum(sum(one.values()) for one in asked)
    assert all(sum(one.values()) for one in asked)
    tokenizers = {address for one in picked for address in one}
    assert 2 == len(tokenizers)
    assert all(sum(one.get(address, 0) for one in picked) for address in tokenizers)
    assert 404 == shared.status_code
    names = {"generator_svc", *(f"{s}-{n}" for s in ("tokenizer_svc", "rest_facade") for n in "12")}
    assert names == set(up.pids)
    assert [] == [name for name in names if f'"service": "{name}"' not in up.log.read_text()]
    assert "2 facades, 2 tokenizers, 1 generator" in up.banner
    assert 0 == status
    assert [] == [name for name, pid in up.pids.items() if is_running(pid)]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["tokenizer_svc-2", "rest_facade-1"])
def test_killed_replica_stops_the_others(up: Up, victim: str) -> None:
    """As with one of each: the status is not 0, the dead one is named, no process is left."""
    os.kill(up.pids[victim], signal.SIGKILL)

    assert 1 == up.process.wait()
    assert f"trivium up: {victim} was killed by SIGKILL" in up.log.read_text()
    assert [] == [name for name, pid in up.pids.items() if is_running(pid)]


@pytest.mark.slow
def test_running_streams_finish_after_sigterm(up: Up) -> None:
    """When SIGTERM arrives, streams of both facades go on to their [DONE]."""
    model = httpx.get(f"{up.url}/models", trust_env=False).json()["data"][0]["id"]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 300,
        "ignore_eos": True,
        "stream": True,
    }
    with contextlib.ExitStack() as stack:
        streams = []
        while not all(running(url) for url in up.metrics):
            client = stack.enter_context(httpx.Client(timeout=60, trust_env=False))
            opened = client.stream("POST", f"{up.url}/chat/completions", json=body)
            streams.append(stack.enter_context(opened).iter_lines())
        up.process.send_signal(signal.SIGTERM)
        ends = [[line for line in lines if line][-1] for lines in streams]

    assert ["data: [DONE]"] * len(ends) == ends
    assert 0 == up.process.wait()


def running(url: str) -> bool:
    """Whether a facade is answering a request right now."""
    return counted(url, "trivium_http_requests_running")[()] > 0
