"""The contenders. All of them play the same scripts and return the same kind of answers.

Bare        the runner alone, on the plans that the engine last made
Engine      the engine alone, in its own process
Services    the three services, streamed over REST
Url         any other OpenAI-compatible server that is already running
LlamaServer a llama-server that runs only during its turns
GenAi       batches in onnxruntime-genai, without a server
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from bench.play import Answer, Play, Recording, Request, Script
from bench.processes import Watch
from bench.scenarios import Load, Scenario
from bench.worker import Worker
from trivium.cli.load import Target
from trivium.cli.supervisor import EXIT_WITH_PARENT, Supervisor
from trivium.wire.listening import free_ports

READY_SECONDS = 120.0
CLIENT = "client"  # the process that sends the requests to all servers
_LENGTH_STEP = 256
_GENAI = Path(__file__).with_name("genai.py")


class Contender(abc.ABC):
    """Something that can play scripts. `name` is shown in tables; `version` may be empty."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.version = ""

    def supports(self, scenario: Scenario) -> bool:
        """Whether this contender can play the scenario."""
        return True

    @contextlib.contextmanager
    def turn(self, scenario: Scenario) -> Iterator[None]:
        """The block in which this contender may use the machine."""
        yield

    @abc.abstractmethod
    def play(self, script: Script) -> Play:
        """Plays a script and measures the resources used."""


class Watched(Contender):
    """A contender whose processes can be watched from here."""

    def play(self, script: Script) -> Play:
        watch = Watch(self.processes())
        answers, client_seconds = self._answers(script)
        used = watch.stop()
        # The client's own count excludes its work after the last answer.
        spent = {**used.cpu_seconds, **({CLIENT: client_seconds} if client_seconds else {})}
        return Play(tuple(answers), spent, used.peak_bytes, used.others)

    @abc.abstractmethod
    def processes(self) -> Mapping[str, int]:
        """Ids of the measured processes, by name."""

    @abc.abstractmethod
    def _answers(self, script: Script) -> tuple[Sequence[Answer], float]:
        """The answers, and the client's CPU seconds (0 without a client)."""


class Engine(Watched):
    """The engine alone. Leaves its plans in `recordings` for Bare."""

    def __init__(self, worker: Worker, recordings: deque[Recording]) -> None:
        super().__init__("engine")
        self._worker = worker
        self._recordings = recordings

    def processes(self) -> Mapping[str, int]:
        return {"engine": self._worker.pid}

    def _answers(self, script: Script) -> tuple[Sequence[Answer], float]:
        recording: Recording = self._worker.call("play", script)
        self._recordings.append(recording)
        return [trace.answer() for trace in recording.traces], 0.0


class Bare(Watched):
    """Replays from `recordings` what the engine has just done with the same scripts.

    The answers are the engine's own, with the times at which this runner would have produced them.
    """

    def __init__(self, worker: Worker, recordings: deque[Recording]) -> None:
        super().__init__("bare")
        self._worker = worker
        self._recordings = recordings

    def processes(self) -> Mapping[str, int]:
        return {"runner": self._worker.pid}

    def _answers(self, script: Script) -> tuple[Sequence[Answer], float]:
        recording = self._recordings.popleft()
        assert len(recording.traces) == len(script.requests), "another script was recorded"
        ends = self._worker.call("replay", recording.plans)
        return [trace.replayed(ends) for trace in recording.traces], 0.0


class Url(Watched):
    """A server that is already running; its processes are unknown."""

    def __init__(self, name: str, target: Target | None, client: Worker) -> None:
        super().__init__(name)
        self._target = target
        self._client = client

    def processes(self) -> Mapping[str, int]:
        return {CLIENT: self._client.pid}

    def _answers(self, script: Script) -> tuple[Sequence[Answer], float]:
        assert self._target is not None
        answers, seconds = self._client.call("play", self._target, script)
        return answers, seconds


class Services(Url):
    """The three services, run by `supervisor`."""

    def __init__(
        self, target: Target, client: Worker, supervisor: Supervisor, name: str = "services"
    ) -> None:
        super().__init__(name, target, client)
        self._supervisor = supervisor

    def processes(self) -> Mapping[str, int]:
        return {**self._supervisor.pids(), **super().processes()}


class LlamaServer(Url):
    """A llama-server, started for each turn with as many slots as the scenario needs."""

    def __init__(self, binary: Path, gguf: Path, client: Worker) -> None:
        super().__init__("llama-server", None, client)
        self._binary = binary
        self._gguf = gguf
        self._process: subprocess.Popen[bytes] | None = None
        printed = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
        self.version = (printed.stdout + printed.stderr).splitlines()[0].removeprefix("version: ")

    @contextlib.contextmanager
    def turn(self, scenario: Scenario) -> Iterator[None]:
        [port] = free_ports(1)
        wrapper = [sys.executable, "-I", EXIT_WITH_PARENT, str(os.getpid())]
        command = [*wrapper, *self._command(scenario, port)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            self._wait(f"http://127.0.0.1:{port}/health")
            self._target = Target(f"http://127.0.0.1:{port}/v1", self._gguf.stem)
            yield
        finally:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def processes(self) -> Mapping[str, int]:
        assert self._process is not None
        return {"llama-server": self._process.pid, **super().processes()}

    def _command(self, scenario: Scenario, port: int) -> list[str]:
        # llama-server divides --ctx-size among its slots; leave some room for its bookkeeping.
        length = -(-(scenario.length + 1) // _LENGTH_STEP) * _LENGTH_STEP
        options = {
            "--model": str(self._gguf),
            "--threads": str(len(os.sched_getaffinity(0))),
            "--parallel": str(scenario.slots),
            "--ctx-size": str(scenario.slots * length),
            "--host": "127.0.0.1",
            "--port": str(port),
        }
        return [
            str(self._binary),
            "--no-webui",
            *(part for pair in options.items() for part in pair),
        ]

    def _wait(self, url: str) -> None:
        assert self._process is not None
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise RuntimeError(f"llama-server exited with status {self._process.returncode}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url, trust_env=False).status_code == httpx.codes.OK:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"llama-server was not ready after {READY_SECONDS:g} s")


class GenAi(Contender):
    """Each wave of requests as one batch, in an interpreter that has onnxruntime-genai."""

    def __init__(self, python: Path, model: Path) -> None:
        super().__init__("genai")
        self._python = python
        self._model = model

    def supports(self, scenario: Scenario) -> bool:
        """Only greedy batches whose rows have equal lengths and start together."""
        if not isinstance(scenario, Load) or scenario.temperature > 0:
            return False
        return scenario.clients <= scenario.slots

    def play(self, script: Script) -> Play:
        """Its process measures itself, from when the model has been loaded."""
        waves = list(zip(*script.clients, strict=True))
        watch = Watch({})
        found = self._run(
            [[request.token_ids for request in wave] for wave in waves], waves[0][0].output
        )
        used = watch.stop()
        self.version = found["version"]
        answers: list[list[Answer]] = []
        sent_at = 0.0
        for wave, ends in zip(waves, found["runs"], strict=True):
            answers.append([_row(request, sent_at, ends) for request in wave])
            sent_at += ends[-1]
        return Play(
            tuple(answer for client in zip(*answers, strict=True) for answer in client),
            {self.name: found["cpu_seconds"]},
            {self.name: found["peak_bytes"]},
            used.others,
        )

    def _run(self, batches: list[list[tuple[int, ...]]], output: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            prompts = Path(folder, "prompts.json")
            prompts.write_text(json.dumps(batches))
            command = [self._python, _GENAI, self._model, "--prompts", prompts]
            done = subprocess.run(
                [*map(str, command), "--output-tokens", str(output)],
                check=True,
                stdout=subprocess.PIPE,
            )
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def _row(request: Request, sent_at: float, ends: Sequence[float]) -> Answer:
    """One row of a batch whose tokens were done `ends` seconds after `sent_at`."""
    times = tuple(sent_at + end for end in ends)
    return Answer(
        sent_at,
        times[-1],
        (times,),
        prompt_tokens=len(request.token_ids),
        completion_tokens=len(times),
    )
