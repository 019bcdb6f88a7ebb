"""Append-only line files; a failed write never corrupts the lines after it."""

import os
from io import FileIO
from pathlib import Path

from filelock import FileLock, Timeout


class LineFile:
    """Appends lines to an open file. The operating system has each one once `write` returns."""

    def __init__(self, file: FileIO, name: str) -> None:
        self.name = name
        self._file = file
        self._is_torn = False  # the last line has no newline

    def write(self, line: bytes) -> None:
        """Appends a line, which must include its newline; raises OSError."""
        rest = b"\n" + line if self._is_torn else line
        while rest:
            rest = rest[os.write(self._file.fileno(), rest) :]
            self._is_torn = bool(rest)

    def close(self) -> None:
        """Leaves the file open, as it is not ours."""


class RotatedLineFile(LineFile):
    """A file that is rotated to `.1` when it is full, which becomes `.2`, up to `backups`."""

    def __init__(self, path: Path, max_bytes: int, backups: int) -> None:
        """Raises OSError if the file is not writable, or another process is writing it."""
        self._path = path
        self._max_bytes = max_bytes
        self._backups = backups
        # A lock file of its own, as rotation renames the log. The lock ends with its process.
        self._lock = FileLock(path.with_name(f".{path.stem}.lock"))
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise OSError(
                f"{path} is in use by another process; give each process its own folder or LOG_NAME"
            ) from None
        super().__init__(self._open(), str(path))
        self._is_torn = not self._ends_whole()

    def write(self, line: bytes) -> None:
        """Appends a line, to a new file if this one is full; raises OSError."""
        if self._file.closed:
            self._file = self._open()
        size = os.fstat(self._file.fileno()).st_size
        # A torn line gets its newline first: readers take one without for still being written.
        if size and size + len(line) > self._max_bytes and not self._is_torn:
            self._rotate()
        super().write(line)

    def close(self) -> None:
        """Closes the file and releases the lock, so that another process may write it."""
        self._file.close()
        self._lock.release()

    def _open(self) -> FileIO:
        return FileIO(self._path, "a+")

    def _ends_whole(self) -> bool:
        size = self._file.seek(0, os.SEEK_END)
        return size == 0 or os.pread(self._file.fileno(), 1, size - 1) == b"\n"

    def _rotate(self) -> None:
        self._file.close()  # so that the next write reopens it if this fails halfway
        for number in range(self._backups, 0, -1):
            newer = self._numbered(number - 1)
            if newer.exists():
                newer.replace(self._numbered(number))
        self._file = self._open()

    def _numbered(self, number: int) -> Path:
        return Path(f"{self._path}.{number}") if number else self._path
