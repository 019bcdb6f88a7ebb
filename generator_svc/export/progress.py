"""How far an export has come. Knows nothing of how it is shown."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called when a step begins, and as often as a step that counts bytes comes further.

    `done` of `total` bytes; a total of None is a step that does not count them. A step with
    another name than the last ends that one.
    """

    def __call__(self, step: str, done: int = 0, total: int | None = None) -> None: ...


def silent(step: str, done: int = 0, total: int | None = None) -> None:
    """Shows nothing."""
