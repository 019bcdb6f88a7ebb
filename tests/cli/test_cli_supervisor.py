"""The supervisor with small child processes: what happens to them however it ends."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.cli.children import Children, is_running
from trivium.cli.supervisor import NotReady, Stage, StageDied, Supervisor


async def test_stops_front_to_back(children: Children) -> None:
    """The stage started last drains first, then the one that it calls."""
    stages = [children.stage(name) for name in ("generator", "tokenizer", "facade")]
    async with Supervisor(stages, stop_seconds=30) as supervisor:
        await supervisor.wait_until_ready(60)
        pids = supervisor.pids()

    assert ["facade stopped", "tokenizer stopped", "generator stopped"] == children.lines()[3:]
    assert not any(is_running(pid) for pid in pids.values())


async def test_replicas_drain_together(children: Children) -> None:
    """All replicas get SIGTERM at once, and the stage behind them after they have ended."""
    both = "signal.signal(signal.SIGTERM, lambda *_: [note('signalled'), wait(), sys.exit(0)])"
    wait = "def wait():\n while open(log).read().count('facade signalled') < 2: pass"
    replica = children.stage("facade", f"{wait}\n{both}\nnote('armed')")

    async def armed() -> None:
        while children.lines().count("facade armed") < 2:  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.01)

    facades = [Stage(f"facade-{number}", replica.command, armed) for number in (1, 2)]
    async with Supervisor([children.stage("generator"), *facades], stop_seconds=60) as supervisor:
        await supervisor.wait_until_ready(60)
        pids = supervisor.pids()

    assert ["facade signalled", "facade signalled", "generator stopped"] == children.lines()[-3:]
    assert not any(is_running(pid) for pid in pids.values())


async def test_reports_the_process_that_died(children: Children) -> None:
    """A process that ends by itself is named with its status, and the others are stopped."""
    stages = [children.stage("generator"), children.stage("tokenizer")]
    with pytest.raises(StageDied, match="generator was killed by SIGKILL"):
        async with Supervisor(stages, stop_seconds=30) as supervisor:
            await supervisor.wait_until_ready(60)
            os.kill(supervisor.pids()["generator"], signal.SIGKILL)
            await supervisor.watch()

    assert "tokenizer stopped" in children.lines()
    assert not any(is_running(pid) for pid in supervisor.pids().values())


async def test_a_process_that_refuses_to_start_ends_the_wait(children: Children) -> None:
    """Waiting for readiness ends as soon as a process ends, however long the timeout."""
    never = Stage("facade", children.stage("facade").command, asyncio.Event().wait)  # type: ignore[arg-type]
    stages = [children.stage("generator", "sys.exit(2)"), never]
    with pytest.raises(StageDied) as death:
        async with Supervisor(stages, stop_seconds=30) as supervisor:
            await supervisor.wait_until_ready(600)

    assert ("generator", 2) == (death.value.name, death.value.returncode)


async def test_late_stages_are_named(children: Children) -> None:
    """A stage that never becomes ready is named after the timeout."""
    late = Stage("tokenizer", children.stage("tokenizer").command, asyncio.Event().wait)  # type: ignore[arg-type]
    with pytest.raises(NotReady, match=r"tokenizer$"):
        async with Supervisor([children.stage("generator"), late], stop_seconds=30) as supervisor:
            await children.until("generator ready")
            await children.until("tokenizer ready")
            await supervisor.wait_until_ready(0.2)


async def test_reason_for_a_late_stage_is_reported(children: Children) -> None:
    """With the stage's own reason, if it gives one."""

    async def refused() -> str:
        return "Wrong key."

    command = children.stage("facade").command
    never = asyncio.Event().wait
    late = [
        Stage("tokenizer", command, never, fault=refused),  # type: ignore[arg-type]
        Stage("facade", command, never),  # type: ignore[arg-type]
    ]
    with pytest.raises(NotReady, match=r"not ready after 0.1 s: tokenizer \(Wrong key.\), facade$"):
        async with Supervisor(late, stop_seconds=30) as supervisor:
            await supervisor.wait_until_ready(0.1)


async def test_process_that_does_not_drain_is_killed(children: Children) -> None:
    """A process that ignores SIGTERM is killed after the timeout."""
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); note('deaf')"
    async with Supervisor([children.stage("facade", deaf)], stop_seconds=0.2) as supervisor:
        await children.until("facade deaf")
        pid = supervisor.pids()["facade"]

    assert not is_running(pid)


async def test_a_failed_start_leaves_nothing_behind(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If one process cannot be started, those before it are stopped."""
    started: list[int] = []
    real = asyncio.create_subprocess_exec

    async def second_fails(*command: str, **options: object) -> asyncio.subprocess.Process:
        if started:
            raise OSError("no more processes")
        process = await real(*command, **options)  # type: ignore[arg-type]
        started.append(process.pid)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", second_fails)
    with pytest.raises(OSError, match="no more processes"):
        async with Supervisor(
            [children.stage("generator"), children.stage("facade")], stop_seconds=30
        ):
            pass

    assert [False] == [is_running(pid) for pid in started]


async def test_environment_reaches_the_process(children: Children) -> None:
    """A stage's settings are added to the environment of its process."""
    stage = children.stage("facade", "note(os.environ['TRIVIUM_FACADE_PORT'])")
    settled = Stage(stage.name, stage.command, stage.ready, {"TRIVIUM_FACADE_PORT": "8123"})
    async with Supervisor([settled], stop_seconds=30):
        await children.until("facade 8123")


def test_children_die_with_a_killed_supervisor(children: Children) -> None:
    """`kill -9` of the supervisor also kills its processes."""
    script = textwrap.dedent(
        """
        import asyncio, sys
        from trivium.cli.supervisor import Stage, Supervisor

        async def main():
            stage = Stage("child", tuple(sys.argv[1:]), asyncio.Event().wait)
            async with Supervisor([stage], stop_seconds=30) as supervisor:
                print(supervisor.pids()["child"], flush=True)
                await supervisor.watch()

        asyncio.run(main())
        """
    )
    command = children.stage("child").command
    with subprocess.Popen(
        [sys.executable, "-c", script, *command], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        while "child ready" not in children.lines():
            time.sleep(0.01)
        parent.kill()

    with contextlib.suppress(ProcessLookupError):
        while is_running(pid):
            time.sleep(0.01)

    assert "child stopped" not in children.lines()
