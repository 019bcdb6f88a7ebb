"""A folder that appears as a whole or not at all, and is written by one process at a time.

Everything is written to a folder next to the final one, which is renamed at the end. A file lock
per final name makes processes that write the same folder wait for each other; the lock is released
when its process dies, so what a killed process left behind is removed by the next one.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_FULL_DISK_BYTES = 2**16  # a disk with less than this free counts as full


@contextlib.contextmanager
def locked(final: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds the lock on `final`; calls `on_wait` before it waits for another process."""
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(final.parent / f".{final.name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        on_wait()
        lock.acquire()
    try:
        _clean_up(final)
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[tuple[Path, Path]]:
    """Yields the folder that becomes `final` on success, and a scratch folder that is removed.

    Only within `locked`. Raises OSError for any error of a library if the disk is full.
    """
    scratch = _scratch(final)
    partial = scratch / "model"
    try:
        partial.mkdir(parents=True)
        with _report_full_disk(scratch):
            yield partial, scratch
        if final.exists():
            final.rename(scratch / "replaced")
        partial.rename(final)
    finally:
        _clean_up(final)


def _scratch(final: Path) -> Path:
    return final.parent / f".{final.name}.partial"


def _clean_up(final: Path) -> None:
    """Removes what was left behind, but restores a folder that was about to be replaced."""
    scratch = _scratch(final)
    replaced = scratch / "replaced"
    if replaced.exists() and not final.exists():
        replaced.rename(final)
    shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _report_full_disk(folder: Path) -> Iterator[None]:
    """Turns errors that libraries raise because of a full disk into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if shutil.disk_usage(folder).free >= _FULL_DISK_BYTES:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
