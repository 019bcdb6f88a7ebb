"""The SHA-256 of a file, computed by reading it once and cached for as long as it is valid.

A digest is valid while the file's size, modification time (mtime) and change time (ctime) are the
same as when it was read. The kernel sets ctime at every change of a file, and no program can set it
back, as `touch -r` does with mtime; so the only changes missed are on file systems without such
times, or made with the clock turned back. A copy has different times: it is read again, and gets
the same digest.

Digests of large files are cached in the user's cache folder, one small file each, shared by all
processes. Without a usable cache they are computed each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trivium.cache_folder import cache_folder

log = logging.getLogger(__name__)

# Smaller files are read each time, which takes a negligible time.
_CACHED_BYTES = 16 * 2**20
# A file this large takes at least a second to read, which should not look like a hang.
_LOGGED_BYTES = 2**30
_PARALLEL_READS = 4
# A file changed more recently than this may change again within the same tick of the file system's
# clock, which has a resolution of seconds on some.
_SETTLED_NANOSECONDS = 2 * 10**9


@dataclass(frozen=True)
class FileDigest:
    """A file's SHA-256 in hex, with the size and times that show whether the file has changed."""

    sha256: str
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def from_json(cls, value: Any) -> FileDigest | None:
        """The inverse of `asdict`; None for anything else."""
        try:
            digest = cls(**value)
        except TypeError:
            return None
        numbers = (digest.size, digest.mtime_ns, digest.ctime_ns)
        is_sound = isinstance(digest.sha256, str) and all(type(n) is int for n in numbers)
        return digest if is_sound else None

    def is_of(self, status: os.stat_result) -> bool:
        """Whether the file is unchanged since it was read."""
        now = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return now == (self.size, self.mtime_ns, self.ctime_ns)


def digest_files(
    paths: Sequence[Path], known: Sequence[FileDigest | None] | None = None
) -> list[FileDigest]:
    """The digests of files, read in parallel; `known` ones are used where they are still valid.

    Raises OSError if a file cannot be read, or changes while it is being read.
    """
    with ThreadPoolExecutor(_PARALLEL_READS, "digest") as threads:
        return list(threads.map(_digest, paths, known or [None] * len(paths)))


def _digest(path: Path, known: FileDigest | None) -> FileDigest:
    status = path.stat()
    if known is not None and known.is_of(status):
        return known
    if status.st_size <= _CACHED_BYTES:
        return read_digest(path)
    entry = _entry(path)
    known = _read_cached(entry)
    if known is not None and known.is_of(status):
        return known
    if status.st_size >= _LOGGED_BYTES:
        size = status.st_size / 1e9
        log.warning("computing the digest of %s (%.1f GB)", path, size)
    started = time.time_ns()
    digest = read_digest(path)
    if started - max(digest.mtime_ns, digest.ctime_ns) > _SETTLED_NANOSECONDS:
        _cache(entry, digest)
    return digest


def read_digest(path: Path) -> FileDigest:
    """The digest of a file as it is now. Raises OSError, also if the file changes meanwhile."""
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        digest = FileDigest(sha256, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
        if not digest.is_of(os.fstat(file.fileno())):
            raise OSError(f"{path} is being modified")
    return digest


def _entry(path: Path) -> Path | None:
    """The cache file for the digest of the file at `path`; None without a cache folder."""
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    with contextlib.suppress(RuntimeError):
        return cache_folder() / "digests" / f"{name}.json"
    return None


def _read_cached(entry: Path | None) -> FileDigest | None:
    if entry is None:
        return None
    try:
        return FileDigest.from_json(json.loads(entry.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _cache(entry: Path | None, digest: FileDigest) -> None:
    """Writes an entry atomically, even with concurrent writers. Only warns if that fails."""
    if entry is None:
        return
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=entry.parent, prefix=".", delete=False, encoding="utf-8"
        ) as file:
            partial = Path(file.name)
            try:
                json.dump(asdict(digest), file)
                file.close()
                partial.replace(entry)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except OSError as error:
        log.warning(
            "a file's digest cannot be cached, so it is recomputed at every start: %s", error
        )
