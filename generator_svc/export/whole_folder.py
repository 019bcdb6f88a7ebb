"""A folder that appears whole or not at all, and that one process at a time makes.

Everything is made in a folder beside the final one and renamed at the end. One file lock per final
name makes those who make the same folder wait for each other; a lock dies with its process, so what
a killed one left behind is removed by the next.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_FULL_DISK_BYTES = 2**16  # what is left of a full one: not enough for the next write


@contextlib.contextmanager
def alone(final: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Waits until no other process makes `final`, and says so to `on_wait` first."""
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(final.parent / f".{final.name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        on_wait()
        lock.acquire()
    try:
        _sweep(final)
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def making(final: Path) -> Iterator[tuple[Path, Path]]:
    """Yields the folder that becomes `final` if all goes well, and one for what is not kept.

    Only while `alone`. Raises OSError for whatever went wrong in a library while the disk was full.
    """
    scratch = _scratch(final)
    made = scratch / "model"
    try:
        made.mkdir(parents=True)
        with _report_full_disk(scratch):
            yield made, scratch
        if final.exists():
            final.rename(scratch / "replaced")
        made.rename(final)
    finally:
        _sweep(final)


def _scratch(final: Path) -> Path:
    return final.parent / f".{final.name}.partial"


def _sweep(final: Path) -> None:
    """Removes what is left behind, but not the folder that was about to be replaced."""
    scratch = _scratch(final)
    replaced = scratch / "replaced"
    if replaced.exists() and not final.exists():
        replaced.rename(final)
    shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _report_full_disk(folder: Path) -> Iterator[None]:
    """Libraries have errors of their own for it, or none but a wrong result."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if shutil.disk_usage(folder).free >= _FULL_DISK_BYTES:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
