"""What an export shows on a terminal, and without one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from generator_svc.export.progress_bar import Steps


class Broken(Exception):
    """Raised by a step that fails."""


def shown(*, fails: bool, is_terminal: bool) -> list[str]:
    """All lines that are written for two steps, the first of which counts bytes."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=is_terminal, width=100, color_system=None)
    try:
        with Steps(console) as steps:
            steps.show("writing the weights", 0, 2_000_000)
            steps.show("writing the weights", 500_000, 2_000_000)
            if fails:
                raise Broken
            steps.show("writing the weights", 2_000_000, 2_000_000)
            steps.show("computing digests")
    except Broken:
        pass
    return output.getvalue().splitlines()


def last(lines: list[str], step: str) -> str:
    return next(line for line in reversed(lines) if step in line)


def test_steps_and_bytes_on_a_terminal() -> None:
    """Finished steps are ticked, the last one too; steps that count bytes show how many."""
    lines = shown(fails=False, is_terminal=True)
    weights, digests = last(lines, "writing the weights"), last(lines, "computing digests")

    assert "✓ writing the weights" in weights
    assert "2.0/2.0 MB" in weights
    assert "✓ computing digests" in digests
    assert "MB" not in digests


def test_a_step_that_failed_is_not_ticked() -> None:
    """It keeps showing how far it got."""
    weights = last(shown(fails=True, is_terminal=True), "writing the weights")

    assert "✓" not in weights
    assert "0.5/2.0 MB" in weights


@pytest.mark.parametrize("fails", [False, True])
def test_one_line_per_step_without_a_terminal(fails: bool) -> None:
    """Without escape sequences, and not a line for each update."""
    steps = ["writing the weights", *(["computing digests"] if not fails else [])]

    assert steps == shown(fails=fails, is_terminal=False)
