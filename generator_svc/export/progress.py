"""How far an export has come. Knows nothing of how it is shown."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Called with the name of the step that begins and the fraction, 0 to 1, that is already done."""


def silent(step: str, fraction: float) -> None:
    """Shows nothing."""
