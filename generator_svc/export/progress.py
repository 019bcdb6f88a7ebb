"""The progress of an export. Knows nothing about how it is shown."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called when a step begins, and whenever a step that counts bytes makes progress.

    `done` of `total` bytes; `total` is None for a step that does not count bytes. A step with a new
    name ends the previous one.
    """

    def __call__(self, step: str, done: int = 0, total: int | None = None) -> None: ...


def silent(step: str, done: int = 0, total: int | None = None) -> None:
    """Shows nothing."""
