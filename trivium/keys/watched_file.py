"""A file that is reloaded when it changes."""

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
    """A file as parsed by `read`, which raises ValueError if the content is invalid.

    If the file becomes invalid later, the last valid content stays in use, and the error is logged
    once. It is read again at each check, since a file that could not be read, for lack of
    permission or file descriptors, may become readable without being modified.
    """

    def __init__(self, path: Path, read: Callable[[Path], Content]) -> None:
        self._path = path
        self._read = read
        self._checked_at = time.monotonic()
        self._stamp = _stamp(path)
        self._content = read(path)
        self._error = ""

    @property
    def content(self) -> Content:
        """The content, at most CHECK_SECONDS old."""
        now = time.monotonic()
        if now - self._checked_at >= CHECK_SECONDS:
            self._checked_at = now
            self._reload()
        return self._content

    def _reload(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            self._error = ""
            return
        try:
            self._content = self._read(self._path)
        except ValueError as error:
            if str(error) != self._error:
                log.error("reload failed, the previous content stays in use: %s", error)
            self._error = str(error)
        else:
            self._stamp, self._error = stamp, ""
            log.info("reloaded %s", self._path)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes with the file, or with the target of a link; None if there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
