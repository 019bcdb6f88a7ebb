"""A generator whose steps take a fixed time: `python -m bench.paced_generator`, configured by
generator_svc's variables.

It is the real service, except that each step sleeps until it has taken as long as with a larger
model. So several generators on few cores are as fast as each would be on its own device, since
their real computation leaves the cores room.
"""

from __future__ import annotations

import time
from dataclasses import replace

from generator_svc import __main__ as service
from generator_svc.plan import StepPlan
from generator_svc.run.outcome import StepOutcome
from generator_svc.run.runner import OrtRunner

STEP_SECONDS = 0.030
ROW_SECONDS = 0.001
PROMPT_TOKEN_SECONDS = 0.0005

_run = OrtRunner.run


def step_seconds(rows: int, prompt_tokens: int) -> float:
    """Seconds of a step with this many decode rows and prompt tokens."""
    return STEP_SECONDS + ROW_SECONDS * rows + PROMPT_TOKEN_SECONDS * prompt_tokens


def paced_run(runner: OrtRunner, plan: StepPlan) -> StepOutcome:
    """OrtRunner.run; the sleep counts as busy time, like moves in the KV cache."""
    prompt_tokens = sum(len(chunk.token_ids) for chunk in plan.chunks)
    due = time.perf_counter() + step_seconds(len(plan.rows), prompt_tokens)
    outcome = _run(runner, plan)
    left = max(due - time.perf_counter(), 0.0)
    time.sleep(left)
    slept = outcome.move_nanoseconds + round(left * 1e9)
    return replace(outcome, move_nanoseconds=slept)


if __name__ == "__main__":
    OrtRunner.run = paced_run  # type: ignore[assignment, method-assign]
    service.main()
