"""Several processes managed as one: started together, stopped front to back, none left behind.

Knows nothing about what the processes do, nor about terminals. A process is stopped by SIGTERM,
upon which it drains; one that has not ended after `stop_seconds` is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

EXIT_WITH_PARENT = str(Path(__file__).with_name("exit_with_parent.py"))


async def _unknown_fault() -> str:
    return ""


@dataclass(frozen=True)
class Stage:
    """One process. `ready` returns once it can serve, however long that takes; `fault` returns why
    it cannot yet, if known.

    Consecutive stages with the same command are replicas: they drain together.
    """

    name: str
    command: tuple[str, ...]
    ready: Callable[[], Awaitable[None]]
    environment: Mapping[str, str] = field(default_factory=dict)
    fault: Callable[[], Awaitable[str]] = _unknown_fault


class StageDied(Exception):
    """A process ended unexpectedly. `returncode` is negative for a signal, as in subprocess."""

    def __init__(self, name: str, returncode: int) -> None:
        how = (
            f"was killed by {signal.Signals(-returncode).name}"
            if returncode < 0
            else f"exited with status {returncode}"
        )
        super().__init__(f"{name} {how}")
        self.name = name
        self.returncode = returncode


class NotReady(Exception):
    """Some processes did not become ready in time; the message says which, and why."""


class Supervisor:
    """Manages the processes of `stages`, ordered back to front: a stage follows those it calls.

    An async context manager: entering starts all of them, leaving stops those still running.
    """

    def __init__(self, stages: Sequence[Stage], stop_seconds: float) -> None:
        self._stages = stages
        self._stop_seconds = stop_seconds
        self._running: dict[str, asyncio.subprocess.Process] = {}

    async def __aenter__(self) -> Self:
        try:
            for stage in self._stages:
                self._running[stage.name] = await _spawn(stage)
        except BaseException:
            await self._end_now()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self.stop()
        finally:
            await self._end_now()

    def pids(self) -> dict[str, int]:
        """Process ids by stage name."""
        return {name: process.pid for name, process in self._running.items()}

    async def wait_until_ready(self, seconds: float) -> None:
        """Returns when every stage is ready; raises StageDied or NotReady.

        NotReady names the stages that were not ready after `seconds`.
        """
        waiting = [asyncio.ensure_future(stage.ready()) for stage in self._stages]
        death = asyncio.ensure_future(self.watch())
        try:
            ready = asyncio.gather(*waiting)
            either: set[asyncio.Future[Any]] = {ready, death}
            await asyncio.wait(either, timeout=seconds, return_when="FIRST_COMPLETED")
            if death.done():
                await death
            if not ready.done():
                pairs = zip(self._stages, waiting, strict=True)
                late = [_with_fault(stage) for stage, task in pairs if not task.done()]
                faults = ", ".join(await asyncio.gather(*late))
                raise NotReady(f"not ready after {seconds:g} s: {faults}")
            await ready
        finally:
            for task in (ready, death):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, StageDied):
                    await task

    async def watch(self) -> None:
        """Raises StageDied as soon as any process has ended; never returns."""
        waits = {
            asyncio.ensure_future(process.wait()): name for name, process in self._running.items()
        }
        try:
            done, _ = await asyncio.wait(waits, return_when="FIRST_COMPLETED")
        finally:
            for task in waits:
                task.cancel()
        first = done.pop()
        raise StageDied(waits[first], first.result())

    async def stop(self) -> None:
        """Ends the stages one after the other, front to back, so that each drains undisturbed.

        The front waits for its last answers, which the stages behind it still have to produce.
        Replicas of a stage end together: otherwise those still running would take new calls.
        """
        for _, replicas in itertools.groupby(reversed(self._stages), lambda stage: stage.command):
            await asyncio.gather(*(self._end(self._running[stage.name]) for stage in replicas))

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), self._stop_seconds)
        except TimeoutError:
            _kill_group(process)
            await process.wait()

    async def _end_now(self) -> None:
        self.kill()
        for process in self._running.values():
            await process.wait()

    def kill(self) -> None:
        """Kills all processes that are still running."""
        for process in self._running.values():
            if process.returncode is None:
                _kill_group(process)


async def _with_fault(stage: Stage) -> str:
    fault = await stage.fault()
    return f"{stage.name} ({fault})" if fault else stage.name


async def _spawn(stage: Stage) -> asyncio.subprocess.Process:
    """Starts a stage in its own session, so that Ctrl-C only reaches the supervisor."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        EXIT_WITH_PARENT,
        str(os.getpid()),
        *stage.command,
        stdin=asyncio.subprocess.DEVNULL,
        env={**os.environ, **stage.environment},
        start_new_session=True,
    )


def _kill_group(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
