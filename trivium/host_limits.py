"""How many processor cores and how much memory this process may use.

A container sees its whole host in /proc. Its limits are set by control groups (cgroups: version 1,
version 2, or both side by side): each group from the process's own up to the root of the hierarchy
can set a limit, and the lowest one counts. Without cgroups, the limits are the affinity mask and
the host's memory.

`root` is the folder that contains proc/ and sys/, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
GIBIBYTE = 2**30


@dataclass(frozen=True)
class CpuLimit:
    """How many `cores` this process may keep busy, and where the limit comes from."""

    cores: int
    source: str

    def __str__(self) -> str:
        return f"{self.cores} core{'s' if self.cores > 1 else ''} ({self.source})"


@dataclass(frozen=True)
class MemoryLimit:
    """Main memory in bytes: the `total` for this process and its peers, and how much is `free`."""

    total: int
    free: int
    source: str

    def __str__(self) -> str:
        free, total = self.free / GIBIBYTE, self.total / GIBIBYTE
        return f"{free:.2f} of {total:.2f} GiB of memory free ({self.source})"


def cpu_limit(root: Path = ROOT, cpus: Collection[int] | None = None) -> CpuLimit:
    """The physical cores among `cpus` (default: the affinity mask), or a lower cgroup quota.

    Hyperthreads share a core's arithmetic units, so a core counts once. A quota is rounded down,
    but to at least 1: when the threads of a process use it up before the end of the period (usually
    0.1 s), all of them are throttled until then.
    """
    if cpus is None:
        cpus = _affinity()
    topology = root / "sys/devices/system/cpu"
    siblings = {_text(topology / f"cpu{n}/topology/thread_siblings_list") or str(n) for n in cpus}
    limit = CpuLimit(max(1, len(siblings)), f"{len(cpus)} logical CPUs")
    for group in _groups(root, "cpu"):
        quota = _quota(group)
        if quota is not None and int(quota) < limit.cores:
            limit = CpuLimit(max(1, int(quota)), f"quota of {quota:g} CPUs in {group}")
    return limit


def memory_limit(root: Path = ROOT) -> MemoryLimit:
    """The host's memory, or that of the cgroup with the least memory left.

    Page cache counts as free, as in the host's own MemAvailable: it is dropped when memory is
    short. Otherwise weights that were read once, say for their digest, would seem to be in use.
    """
    limit = _host_memory(root)
    for group in _groups(root, "memory"):
        statistics = _statistics(group)
        maxima = [
            _number(group / "memory.max"),
            _number(group / "memory.high"),  # above it, the kernel throttles the group heavily
            _number(group / "memory.limit_in_bytes"),
            statistics.get("hierarchical_memory_limit"),
        ]
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
        for name in ("inactive_file", "active_file"):
            used -= statistics.get(f"total_{name}", statistics.get(name, 0))
        known = [maximum for maximum in maxima if maximum is not None]
        if known and min(known) - used < limit.free:
            free = max(0, min(known) - max(0, used))
            limit = MemoryLimit(min(known), free, f"memory limit in {group}")
    return limit


def _affinity() -> Collection[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _quota(group: Path) -> float | None:
    """CPUs that a group may use on average; None without a limit."""
    quota, _, period = _text(group / "cpu.max").partition(" ")
    if not quota:
        quota = _text(group / "cpu.cfs_quota_us")
        period = _text(group / "cpu.cfs_period_us")
    try:
        return int(quota) / int(period) if int(quota) > 0 else None
    except (ValueError, ZeroDivisionError):  # "max", or no such files
        return None


def _host_memory(root: Path) -> MemoryLimit:
    kibibytes = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        kibibytes[name] = int(value.split()[0])
    if "MemAvailable" in kibibytes:
        total, free = kibibytes["MemTotal"] * 1024, kibibytes["MemAvailable"] * 1024
    else:
        # Not Linux: assume that half of the memory is free.
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = total // 2
    return MemoryLimit(total, free, "this host")


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the cgroups that this process is in, from its own to the mounted root.

    Covers version 1's hierarchy for `controller`, and version 2's single hierarchy.
    """
    own: dict[str, str] = {}  # the process's group, by type of file system
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            own["cgroup" if controllers else "cgroup2"] = group
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, _, source = line.partition(" - ")
        _, _, _, top, point, *_ = mount.split()
        kind, *_, options = source.split()
        if kind not in own or (kind == "cgroup" and controller not in options.split(",")):
            continue
        folder = root / point.lstrip("/")
        # In a container, the mount begins at its own group; a path that is not below it starts
        # outside, where nothing is visible.
        below = Path(own[kind])
        parts = below.relative_to(top).parts if below.is_relative_to(top) else ()
        parts = () if ".." in parts else parts
        for depth in range(len(parts), -1, -1):
            yield folder.joinpath(*parts[:depth])


def _statistics(group: Path) -> dict[str, int]:
    pairs = (line.split() for line in _text(group / "memory.stat").splitlines())
    return {name: int(value) for name, value in pairs}


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdecimal() else None


def _text(file: Path) -> str:
    """A small file's text, stripped; empty if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
