"""Real cgroups with limits, on machines that allow creating them."""

import contextlib
import itertools
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

MOUNTS = Path("/sys/fs/cgroup")
JOIN = (
    'while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs" || exit 125; shift; done; shift; exec "$@"'
)
NUMBERS = itertools.count()


class CgroupUnavailable(Exception):
    """No cgroup can be created here."""


@contextlib.contextmanager
def limited(memory_bytes: int, cpus: float) -> Iterator[tuple[str, ...]]:
    """Creates a cgroup, v1 or v2; yields the command prefix that runs a command in it.

    Raises CgroupUnavailable.
    """
    quota = str(int(cpus * 100_000))
    name = f"trivium-test-{os.getpid()}-{next(NUMBERS)}"
    if (MOUNTS / "cgroup.controllers").exists():
        files = {"memory.max": str(memory_bytes), "cpu.max": f"{quota} 100000"}
        groups = {MOUNTS / name: files}
    else:
        groups = {
            MOUNTS / "memory" / name: {"memory.limit_in_bytes": str(memory_bytes)},
            MOUNTS / "cpu" / name: {"cpu.cfs_quota_us": quota},
        }
    made = []
    try:
        for folder, files in groups.items():
            folder.mkdir()
            made.append(folder)
            for file, text in files.items():
                (folder / file).write_text(text)
        prefix = ("sh", "-c", JOIN, "sh", *map(str, made), "--")
        subprocess.run([*prefix, "true"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CgroupUnavailable(str(error)) from error
    else:
        yield prefix
    finally:
        for folder in made:
            while (folder / "cgroup.procs").read_text():  # a child that has not quite ended
                time.sleep(0.05)
            folder.rmdir()
