"""Files to which lines are added, each on a line of its own whatever failed before it."""

import os
from io import FileIO
from pathlib import Path

from filelock import FileLock, Timeout


class LineFile:
    """Adds lines to a file that is open. Each is with the operating system once `write` returns."""

    def __init__(self, file: FileIO, name: str) -> None:
        self.name = name
        self._file = file
        self._is_torn = False  # the last line lacks its end

    def write(self, line: bytes) -> None:
        """Adds a line, which brings its own end; raises OSError."""
        rest = b"\n" + line if self._is_torn else line
        while rest:
            rest = rest[os.write(self._file.fileno(), rest) :]
            self._is_torn = bool(rest)

    def close(self) -> None:
        """Leaves the file open, as it is not ours."""


class RotatedLineFile(LineFile):
    """A file of its own, which becomes `.1` when it is full, and that one `.2`, up to `backups`."""

    def __init__(self, path: Path, max_bytes: int, backups: int) -> None:
        """Raises OSError for a file that cannot be written to, or that another process writes."""
        self._path = path
        self._max_bytes = max_bytes
        self._backups = backups
        # Of a name that stays, unlike the file's. A lock dies with its process.
        self._lock = FileLock(path.with_name(f".{path.stem}.lock"))
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise OSError(
                f"another process writes {path}; each needs a folder or a LOG_NAME of its own"
            ) from None
        super().__init__(self._open(), str(path))
        self._is_torn = not self._ends_whole()

    def write(self, line: bytes) -> None:
        """Adds a line, to a new file if this one is full; raises OSError."""
        if self._file.closed:
            self._file = self._open()
        size = os.fstat(self._file.fileno()).st_size
        # A torn line gets its end first: readers pass over one without, as it is being written.
        if size and size + len(line) > self._max_bytes and not self._is_torn:
            self._rotate()
        super().write(line)

    def close(self) -> None:
        """Closes the file, which another process may write then."""
        self._file.close()
        self._lock.release()

    def _open(self) -> FileIO:
        return FileIO(self._path, "a+")

    def _ends_whole(self) -> bool:
        size = self._file.seek(0, os.SEEK_END)
        return size == 0 or os.pread(self._file.fileno(), 1, size - 1) == b"\n"

    def _rotate(self) -> None:
        self._file.close()  # so that the next write opens one, should this fail halfway
        for number in range(self._backups, 0, -1):
            newer = self._numbered(number - 1)
            if newer.exists():
                newer.replace(self._numbered(number))
        self._file = self._open()

    def _numbered(self, number: int) -> Path:
        return Path(f"{self._path}.{number}") if number else self._path
