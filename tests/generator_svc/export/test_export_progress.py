"""What an export shows on a terminal, and where there is none."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from generator_svc.export.progress_bar import Steps


def shown(error: Exception | None, *, is_terminal: bool) -> list[str]:
    """The last state of each line after two steps, of which the second counts bytes."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=is_terminal, width=100, color_system=None)
    try:
        with Steps(console) as steps:
            steps.show("tracing")
            steps.show("writing the weights", 0, 2_000_000)
            steps.show("writing the weights", 2_000_000 if error is None else 500_000, 2_000_000)
            if error is not None:
                raise error
    except ValueError:
        pass
    lines = output.getvalue().splitlines()
    return [
        next(line for line in reversed(lines) if step in line)
        for step in ("tracing", "writing the weights")
    ]


def test_steps_and_bytes_on_a_terminal() -> None:
    """Steps that are done are ticked; one that counts bytes says how many, and the time left."""
    tracing, weights = shown(None, is_terminal=True)

    assert "✓ tracing" in tracing
    assert "MB" not in tracing
    assert "✓ writing the weights" in weights
    assert "2.0/2.0 MB" in weights


def test_a_step_that_failed_is_not_ticked() -> None:
    """It stays as far as it came."""
    tracing, weights = shown(ValueError(), is_terminal=True)

    assert "✓ tracing" in tracing
    assert "✓" not in weights
    assert "0.5/2.0 MB" in weights


@pytest.mark.parametrize("error", [None, ValueError()])
def test_a_line_for_each_step_elsewhere(error: Exception | None) -> None:
    """Without escape sequences, and not one for each byte."""
    assert ["tracing", "writing the weights"] == shown(error, is_terminal=False)
