"""The three services as real processes that a test can kill and restart."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.ports import free_ports
from trivium.cli.pipeline import LOOPBACK, Pipeline

STAGES = ("generator_svc", "tokenizer_svc", "rest_facade")


class Services:
    """`settings` are further environment variables. A context manager that stops all processes."""

    def __init__(self, model: Path, logs: Path, **settings: Any) -> None:
        ports = free_ports(5)
        self.pipeline = Pipeline(
            model=model,
            port=ports[0],
            tokenizer_port=ports[1],
            tokenizer_metrics_port=ports[2],
            generator_port=ports[3],
            generator_metrics_port=ports[4],
            drain_seconds=20,
        )
        self.model = model.name
        self.url = self.pipeline.url
        self.chat_target = self.pipeline.chat_target
        self.generator_target = self.pipeline.generator_target
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._logs = logs
        self._settings = {name: str(value) for name, value in settings.items()}
        # No TLS: loading the CA certificates would take longer than a poll. Connections are not
        # kept.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(verify=False, limits=limits)

    def __enter__(self) -> "Services":
        for name in STAGES:
            self.start(name)
        self.wait_until_ready()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        self._client.close()

    def start(self, name: str, **settings: Any) -> None:
        stage = next(stage for stage in self.pipeline.stages() if stage.name == name)
        environment = {**os.environ, **stage.environment, **self._settings}
        environment |= {key: str(value) for key, value in settings.items()}
        with (self._logs / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", name], env=environment, stderr=log
            )

    def kill(self, name: str) -> None:
        """kill -9."""
        self.processes[name].kill()
        self.processes[name].wait()

    def terminate(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGTERM)

    def log(self, name: str) -> str:
        return (self._logs / f"{name}.log").read_text()

    def wait_until_ready(self) -> None:
        self.until(lambda: self.health() == 200, "the services are not ready")

    def finish_reason(self, api_key: str = "none") -> str:
        """The finish reason of an answer with eight tokens, by OpenAI's client."""
        with openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=120
        ) as client:
            answer = client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": "hello"}],
                max_tokens=8,
                extra_body={"ignore_eos": True},
            )
        return answer.choices[0].finish_reason

    def health(self) -> int:
        try:
            return self._client.get(f"{self.url}/health").status_code
        except httpx.TransportError:
            return 0

    def until(self, holds: Any, otherwise: str, seconds: float = 60) -> None:
        """Polls until `holds()` is true; fails if a process has died."""
        deadline = time.monotonic() + seconds
        while not holds():
            for name, process in self.processes.items():
                assert process.poll() in (None, 0, -signal.SIGKILL), f"{name}: {self.log(name)}"
            assert time.monotonic() < deadline, otherwise
            time.sleep(0.02)

    def generator_metrics(self) -> dict[str, float]:
        """Metric values by name, summed over labels."""
        url = f"http://{LOOPBACK}:{self.pipeline.generator_metrics_port}/metrics"
        text = self._client.get(url).text
        values: dict[str, float] = {}
        for name, value in re.findall(r"^([a-zA-Z_:]+)(?:\{.*\})? ([0-9.e+-]+)$", text, re.M):
            values[name] = values.get(name, 0.0) + float(value)
        return values

    def wait_until_idle(self) -> dict[str, float]:
        """Waits until nothing runs or waits in the generator; returns its metrics."""

        def is_idle() -> bool:
            metrics = self.generator_metrics()
            running = metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]
            return running == metrics["trivium_slots_in_use"] == 0

        self.until(is_idle, "the generator is not idle")
        return self.generator_metrics()

    def is_running(self, count: int) -> bool:
        return self.generator_metrics()["vllm:num_requests_running"] == count
