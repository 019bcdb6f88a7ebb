"""A closed loop of clients on an engine in this process, and its steps over again without one.

`EngineLoop.run` is what the engine alone does; `replay` runs the very plans that it made on the
bare runner, with nothing around it: the most that services on top could reach.
"""

import queue
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from generator_svc.admission import Admission
from generator_svc.engine import Engine
from generator_svc.kv_cache import SlotCache
from generator_svc.metering import Meter
from generator_svc.plan import StepPlan
from generator_svc.runner import OrtRunner, Outcome
from generator_svc.scheduler import Scheduler
from generator_svc.sequence import Generation, Sampling, Update

_CACHE_DEPTH = 100_000


@dataclass(frozen=True)
class LoopResult:
    """`first` and `gaps` in seconds: from a request to its first token, and between tokens."""

    tokens: int
    seconds: float
    first: Sequence[float]
    gaps: Sequence[float]
    plans: Sequence[StepPlan] = ()


class _Recorder:
    """A runner that notes what it is told."""

    def __init__(self, runner: OrtRunner) -> None:
        self._runner = runner
        self.plans: list[StepPlan] = []

    def run(self, plan: StepPlan) -> Outcome:
        self.plans.append(plan)
        return self._runner.run(plan)


class EngineLoop:
    """`clients` clients, each with `requests` greedy requests of one shape, one after another.

    Prompts differ but for their first `shared` tokens.
    """

    def __init__(self, runner: OrtRunner, vocabulary: int, seed: int) -> None:
        self._runner = runner
        self._vocabulary = vocabulary
        self._random = random.Random(seed)

    def run(
        self, clients: int, requests: int, prompt: int, output: int, shared: int = 0
    ) -> LoopResult:
        recorder = _Recorder(self._runner)
        updates: queue.SimpleQueue[list[Update]] = queue.SimpleQueue()
        meter = Meter()
        info = self._runner.info
        cache = SlotCache(info.slots, info.slot_length)
        scheduler = Scheduler(cache, 256, 512, meter.settle)
        admission = Admission(_CACHE_DEPTH, _CACHE_DEPTH * prompt)
        engine = Engine(scheduler, recorder, meter, admission, updates.put, _raise)
        engine.start()
        left, running = clients * (requests - 1), clients
        first, gaps, last = [], [], {}
        began = time.perf_counter()
        for _ in range(clients):
            last[self._submit(engine, prompt, output, shared)] = time.perf_counter(), True
        while running:
            for update in updates.get():
                now = time.perf_counter()
                before, is_first = last[update.group]
                (first if is_first else gaps).append(now - before)
                last[update.group] = now, False
                if not update.is_finished:
                    continue
                if left:
                    left -= 1
                    last[self._submit(engine, prompt, output, shared)] = time.perf_counter(), True
                else:
                    running -= 1
        seconds = time.perf_counter() - began
        engine.close()
        return LoopResult(clients * requests * output, seconds, first, gaps, recorder.plans)

    def _submit(self, engine: Engine, prompt: int, output: int, shared: int) -> object:
        own = (self._random.randrange(self._vocabulary) for _ in range(prompt - shared))
        ids = (*[0] * shared, *own)
        return engine.submit(Generation(ids, output, Sampling(temperature=0)))


def replay(runner: OrtRunner, plans: Sequence[StepPlan]) -> float:
    """Seconds that the plans take on the bare runner."""
    began = time.perf_counter()
    for plan in plans:
        runner.run(plan)
    return time.perf_counter() - began


def _raise(fault: BaseException) -> None:
    raise fault
