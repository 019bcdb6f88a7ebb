"""Detects a hung device: a step that never ends, and with it every answer in it."""

import asyncio
from collections.abc import Callable

_CHECKS = 20  # of a step before it has timed out
_MAX_INTERVAL_SECONDS = 1.0


async def step_timed_out(running_step: Callable[[], int | None], timeout_seconds: float) -> None:
    """Returns once the same step has been running for `timeout_seconds`; if that is 0, never.

    `running_step` identifies the step that is running; None between steps. Adds up the intervals
    between its own checks instead of reading a clock: time in which the whole process was stopped
    does not count.
    """
    interval = min(timeout_seconds / _CHECKS or _MAX_INTERVAL_SECONDS, _MAX_INTERVAL_SECONDS)
    step, seconds = None, 0.0
    while not timeout_seconds or seconds < timeout_seconds:
        await asyncio.sleep(interval)
        last, step = step, running_step()
        seconds = seconds + interval if step is not None and step == last else 0.0
