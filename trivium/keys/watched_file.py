"""A file that is read again when it has changed."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

CHECK_SECONDS = 1.0

Content = TypeVar("Content")


class WatchedFile(Generic[Content]):
    """What `read` makes of a file, which raises ValueError for one that it cannot take.

    A file that goes bad later leaves the last good content in force, and is logged once.
    """

    def __init__(self, path: Path, read: Callable[[Path], Content]) -> None:
        self._path = path
        self._read = read
        self._checked_at = time.monotonic()
        self._stamp = _stamp(path)
        self._content = read(path)

    @property
    def content(self) -> Content:
        """As the file is now, or was a second ago."""
        now = time.monotonic()
        if now - self._checked_at >= CHECK_SECONDS:
            self._checked_at = now
            self._reload()
        return self._content

    def _reload(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._content = self._read(self._path)
            log.info("%s was read again", self._path)
        except ValueError as error:
            log.error("what was read of it before stays in force: %s", error)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """None for a file that is not there; a link may lead to another file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
