"""The cost of a generator step on a device: measured once, stored as JSON, looked up by plan.

Four kinds of time, in seconds; fits minimize the squared relative error.

    decode   by rows and context, measured on a grid and interpolated linearly
    chunk    a + b*k + c*k*p for k prompt tokens at a mean position p, fitted; a batch of prompts is
             treated as one such chunk of all its positions, including padding: on a GPU, c reflects
             attention less than matrix products that are no longer limited by reading weights
    move     a + b*n for n tokens copied between slots, fitted; a swap is three copies
    around   the time of a step outside its runs: a constant plus a cost per output token
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from generator_svc.config import GeneratorSettings
from generator_svc.engine import Engine
from generator_svc.metering import Meter
from generator_svc.plan import Chunk, Copy, Row, StepPlan, Swap
from generator_svc.run.outcome import Runner, StepOutcome
from generator_svc.run.runner import OrtRunner
from generator_svc.sequence import EngineRequest, SamplingParams, SequenceUpdate
from generator_svc.startup import build_engine

ROWS = (1, 2, 4, 8, 16, 32)
CONTEXTS = (64, 1024)  # tokens before the one being computed
CHUNKS = (8, 64, 256)  # tokens
STARTS = (0, 512)  # where the chunks begin
MOVES = (32, 512)  # tokens
REPEATS = 5
OVERHEAD_STEPS = 24


@dataclass(frozen=True)
class StepCosts:
    """Times in seconds. `decode` is [contexts][rows]; the others are coefficients, as above.

    `device` is `cpu` or `cuda`, which determines the engine's policy.
    """

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    decode: tuple[tuple[float, ...], ...]
    chunk: tuple[float, ...]
    move: tuple[float, ...]
    around_step: float
    around_token: float
    device: str = "cpu"

    def decode_seconds(self, rows: int, context: float) -> float:
        """A decode batch of `rows` with a mean context of `context` tokens; extrapolated linearly
        outside the grid."""
        times = [interpolate(self.rows, of_context, rows) for of_context in self.decode]
        return max(interpolate(self.contexts, times, context), 0.0)

    def chunk_seconds(self, length: int, start: int) -> float:
        """A prefill chunk of `length` tokens from position `start`."""
        constant, per_token, per_pair = self.chunk
        return max(constant + length * (per_token + per_pair * (start + length / 2)), 0.0)

    def move_seconds(self, move: Copy | Swap) -> float:
        """A copy or swap of keys and values between slots."""
        constant, per_token = self.move
        return (constant + per_token * move.length) * (3 if isinstance(move, Swap) else 1)

    def around_seconds(self, tokens: int) -> float:
        """The time outside its runs of a step that produces `tokens` tokens."""
        return self.around_step + self.around_token * tokens

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def load(path: Path) -> StepCosts:
    """Reads what `StepCosts.save` wrote."""
    fields: dict[str, Any] = json.loads(path.read_text())
    fields["decode"] = [tuple(times) for times in fields["decode"]]
    tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return StepCosts(**tuples)


def served_engine(
    runner: Runner,
    deliver: Callable[[list[SequenceUpdate]], None],
    settings: GeneratorSettings | None = None,
) -> Engine:
    """The engine as the service builds it, with the policy set by the service's own environment.

    `runner` has an `info` like OrtRunner's. Its thread is not started: the caller calls `step`.
    """
    settings = settings or GeneratorSettings(model_directory=Path())
    return build_engine(settings, cast(OrtRunner, runner), Meter(), deliver, _raise)


def measure(runner: OrtRunner) -> StepCosts:
    """Measures the costs; takes about ten seconds on a small model, and uses all slots."""
    info = runner.info
    rows = (*(number for number in ROWS if number < info.slots), info.slots)
    contexts = tuple(min(context, info.slot_length - 1) for context in CONTEXTS)
    chunks = [(k, p) for p in STARTS for k in CHUNKS if k + p <= info.slot_length]
    moves = [min(length, info.slot_length) for length in MOVES]
    plans = [StepPlan(rows=(Row(0, context),) * count) for context in contexts for count in rows]
    plans += [StepPlan(chunks=(Chunk(0, p, (0,) * k, wants_logits=True),)) for k, p in chunks]
    plans += [StepPlan(moves=(Copy(0, info.slots - 1, length),)) for length in moves]
    times = _times(runner, plans)
    chunk_times = times[len(contexts) * len(rows) : -len(moves)]
    around_step, around_token = _measure_around(runner)
    return StepCosts(
        rows=rows,
        contexts=contexts,
        decode=tuple(tuple(times[n * len(rows) :][: len(rows)]) for n in range(len(contexts))),
        chunk=_fit([(1.0, k, k * (p + k / 2)) for k, p in chunks], chunk_times),
        move=_fit([(1.0, length) for length in moves], times[-len(moves) :]),
        around_step=around_step,
        around_token=around_token,
        device=info.device,
    )


def mean(many: Sequence[StepCosts]) -> StepCosts:
    """The mean of measurements on the same grid, such as before and after a run."""
    names = ("decode", "chunk", "move", "around_step", "around_token")
    times = {name: _mean([getattr(costs, name) for costs in many]) for name in names}
    return dataclasses.replace(many[0], **times)


def _mean(values: Sequence[Any]) -> Any:
    """The mean of numbers, or elementwise of tuples of equal shape."""
    if isinstance(values[0], tuple):
        return tuple(_mean(parts) for parts in zip(*values, strict=True))
    return statistics.fmean(values)


def interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """`ys` at `x`, linear between neighbours and beyond the ends; `xs` must be ascending."""
    if len(xs) == 1 or xs[0] == xs[-1]:
        return ys[0]
    right = min(max(int(np.searchsorted(xs, x)), 1), len(xs) - 1)
    left = right - 1
    return ys[left] + (ys[right] - ys[left]) * (x - xs[left]) / (xs[right] - xs[left])


def _fit(terms: Sequence[Sequence[float]], times: Sequence[float]) -> tuple[float, ...]:
    """The coefficient of each term."""
    scaled = np.array(terms) / np.array(times)[:, None]
    return tuple(map(float, np.linalg.lstsq(scaled, np.ones(len(times)), rcond=None)[0]))


def _times(runner: OrtRunner, plans: Sequence[StepPlan]) -> list[float]:
    """The median time of each plan over REPEATS rounds. The plans take turns, so that a slow moment
    affects all of them."""
    rounds = []
    for _ in range(REPEATS + 1):
        times = []
        for plan in plans:
            began = time.perf_counter()
            runner.run(plan)
            times.append(time.perf_counter() - began)
        rounds.append(times)
    return [statistics.median(times) for times in zip(*rounds[1:], strict=True)]


class _Stopwatch:
    """A runner that adds up the time spent in its runs, in seconds."""

    def __init__(self, runner: OrtRunner) -> None:
        self._runner = runner
        self.info = runner.info
        self.seconds = 0.0

    def run(self, plan: StepPlan) -> StepOutcome:
        began = time.perf_counter()
        outcome = self._runner.run(plan)
        self.seconds += time.perf_counter() - began
        return outcome


def _measure_around(runner: OrtRunner) -> tuple[float, float]:
    """Seconds of a step outside its runs: a constant, and a cost per row."""
    many = max(runner.info.slots // 2, 1)
    at_one, at_many = _time_around(runner, 1), _time_around(runner, many)
    per_token = max(at_many - at_one, 0.0) / max(many - 1, 1)
    return max(at_one - per_token, 0.0), per_token


def _time_around(runner: OrtRunner, rows: int) -> float:
    """Seconds of an engine step with `rows` greedy sequences, excluding its runs."""
    stopwatch = _Stopwatch(runner)
    engine = served_engine(stopwatch, lambda updates: None)
    for number in range(rows):
        prompt = (number + 1,) * 8
        engine.submit(
            EngineRequest(prompt, 2 * OVERHEAD_STEPS + rows, SamplingParams(temperature=0))
        )
    while engine.load().waiting_requests:
        engine.step()
    spent = []
    for _ in range(OVERHEAD_STEPS):
        before, began = stopwatch.seconds, time.perf_counter()
        engine.step()
        spent.append(time.perf_counter() - began - (stopwatch.seconds - before))
    return statistics.median(spent)


def _raise(fault: BaseException) -> None:
    raise fault
