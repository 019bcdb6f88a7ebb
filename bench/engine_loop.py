"""Clients of an engine in this process, and a replay of the engine's steps on the bare runner.

`EngineLoop` measures the engine alone. `BareRunner` runs the plans that the engine made and nothing
else: no sampling, no scheduling, no clients. That is the most that the services could reach. Both
use the service's own settings, and the engine is built by the service's own code. A bare runner
gets all plans of an engine in order, so that its slots hold the same keys and values.
"""

from __future__ import annotations

import functools
import queue
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.play import Recording, Request, Script, Trace
from generator_svc.config import GeneratorSettings
from generator_svc.metering import Meter
from generator_svc.plan import StepPlan
from generator_svc.run.outcome import DeviceInfo, StepOutcome
from generator_svc.run.runner import OrtRunner
from generator_svc.sequence import EngineRequest, SamplingParams, SequenceUpdate
from generator_svc.startup import build_engine, load_runner, warm_up
from trivium.model_directory import load_model_directory

# As in the service: the engine's thread needs the GIL when a run ends.
_SWITCH_INTERVAL_SECONDS = 0.0005


class _Recorder:
    """A runner that records its plans and how many steps have ended.

    All other attributes are the wrapped runner's.
    """

    def __init__(self, runner: OrtRunner) -> None:
        self._runner = runner
        self.plans: list[StepPlan] = []
        self.ended = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def start(self) -> None:
        self.plans, self.ended = [], 0

    def run(self, plan: StepPlan) -> StepOutcome:
        plans = self.plans
        plans.append(plan)
        outcome = self._runner.run(plan)
        if plans is self.plans:  # else the step began before this script, in a pause
            self.ended += 1
        return outcome


class EngineLoop:
    """An engine whose prefix cache persists from script to script, as a server's does."""

    def __init__(self, folder: Path, device: str) -> None:
        sys.setswitchinterval(_SWITCH_INTERVAL_SECONDS)
        settings, runner, meter = _load(folder, device)
        self._info = runner.info
        self._recorder = _Recorder(runner)
        self._events: queue.SimpleQueue[tuple[int, list[SequenceUpdate]] | BaseException]
        self._events = queue.SimpleQueue()
        recorder: Any = self._recorder  # stands in for the runner it wraps
        self._engine = build_engine(settings, recorder, meter, self._deliver, self._events.put)
        self._engine.start(functools.partial(warm_up, settings, runner, meter))

    def info(self) -> DeviceInfo:
        """The device, slots and cache size that the service would use."""
        return self._info

    def play(self, script: Script) -> Recording:
        """Plays a script; raises the engine's error if it fails."""
        self._recorder.start()
        clients, late = script.numbered()
        firsts = [requests[0][0] for requests in clients]
        lines = [iter(requests) for requests in clients]
        line_of = {place: lines[at] for at, requests in enumerate(clients) for place, _ in requests}
        traces: dict[int, Trace] = {}
        running = sum(self._submit_next(line, traces) for line in lines)
        while running:
            for place in self._ended():
                running += self._submit_next(line_of.get(place, iter(())), traces) - 1
            if late and _have_received(traces, firsts, script.late_after):
                running += self._submit_next(iter([late]), traces)
                late = None
        return Recording(tuple(self._recorder.plans), tuple(traces[n] for n in sorted(traces)))

    def _deliver(self, updates: list[SequenceUpdate]) -> None:
        self._events.put((self._recorder.ended - 1, updates))

    def _submit_next(
        self, requests: Iterator[tuple[int, Request]], traces: dict[int, Trace]
    ) -> int:
        """Submits a client's next request, if any; returns the number submitted."""
        following = next(requests, None)
        if following is None:
            return 0
        place, request = following
        trace = Trace(
            request, time.perf_counter(), self._recorder.ended, [[] for _ in range(request.n)]
        )
        traces[place] = trace
        sampling = SamplingParams(temperature=request.temperature, top_p=request.top_p, seed=place)
        engine_request = EngineRequest(request.token_ids, request.output, sampling, n=request.n)
        self._engine.submit(engine_request, tag=(place, trace))
        return 1

    def _ended(self) -> Iterator[int]:
        """Handles a step's updates; yields the places of the requests that ended."""
        event = self._events.get()
        now = time.perf_counter()
        if isinstance(event, BaseException):
            raise event
        step, updates = event
        for update in updates:
            if update.error is not None:
                raise update.error
            if update.token is None:
                continue
            place, trace = update.group.tag
            trace.tokens[update.sequence.index].append((now, step, update.token.token_id))
            if sum(map(len, trace.tokens)) == trace.request.output * trace.request.n:
                sequences = update.group.sequences
                trace.cached_tokens = sequences[0].cached_prompt_tokens
                trace.device_nanoseconds = sum(each.device_nanoseconds for each in sequences)
                yield place


class BareRunner:
    """A runner without an engine."""

    def __init__(self, folder: Path, device: str) -> None:
        _, self._runner, _ = _load(folder, device)

    def replay(self, plans: Sequence[StepPlan]) -> list[float]:
        """Runs plans one after another; returns the seconds from the start to the end of each."""
        ends = []
        began = time.perf_counter()
        for plan in plans:
            self._runner.run(plan)
            ends.append(time.perf_counter() - began)
        return ends


def _load(folder: Path, device: str) -> tuple[GeneratorSettings, OrtRunner, Meter]:
    """A runner as the service would load it, with the same variables, before warm-up."""
    values: dict[str, Any] = {"model_directory": folder, "device": device}
    settings = GeneratorSettings(**values)
    runner, meter = load_runner(settings, load_model_directory(folder)), Meter()
    return settings, runner, meter


def _have_received(traces: dict[int, Trace], places: list[int], tokens: int) -> bool:
    return all(len(traces[place].tokens[0]) >= tokens for place in places)
