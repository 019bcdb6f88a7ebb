"""CPU time and peak memory of processes, from /proc."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_IDLE, _IO_WAIT = 3, 4  # columns of /proc/stat that are not busy time
_GUEST = 8  # columns from here on are already counted in others


@dataclass(frozen=True)
class Usage:
    """CPU seconds and peak memory in bytes, by process name.

    `others` is the share, 0 to 1, of all cores' time that went to other processes or was stolen by
    a virtual machine's host.
    """

    cpu_seconds: Mapping[str, float]
    peak_bytes: Mapping[str, int]
    others: float


class Watch:
    """Watches named processes from its creation until `stop`; this process is their keeper."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = pids
        for pid in pids.values():
            _reset_peak(pid)
        self._before = self._now()

    def stop(self) -> Usage:
        """The resources used since the start."""
        before, after = self._before, self._now()
        spent = {name: after[1][name] - before[1][name] for name in after[1]}
        machine = (after[0] - before[0]) * len(os.sched_getaffinity(0))
        others = (after[2] - before[2] - sum(spent.values())) / machine
        own = {name: spent[name] for name in self._pids}
        peaks = {name: peak_bytes(pid) for name, pid in self._pids.items()}
        return Usage(own, peaks, min(max(others, 0.0), 1.0))

    def _now(self) -> tuple[float, dict[str, float], float]:
        """The time, CPU seconds by process (the keeper's under ""), and the machine's."""
        spent = {name: cpu_seconds(pid) for name, pid in self._pids.items()}
        keeper = cpu_seconds(os.getpid(), with_children=True)
        return time.perf_counter(), {**spent, "": keeper}, _machine_seconds()


def cpu_seconds(pid: int, with_children: bool = False) -> float:
    """CPU seconds of one process so far, including its threads, in clock ticks of 0.01 s.

    `with_children` adds those of its children that have ended.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11 : 15 if with_children else 13])) / _TICKS


def peak_bytes(pid: int) -> int:
    """A process's peak memory in bytes since the peak was last reset."""
    status = Path(f"/proc/{pid}/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


def _reset_peak(pid: int) -> None:
    with contextlib.suppress(OSError):  # not allowed everywhere; then it is the lifetime peak
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def _machine_seconds() -> float:
    """Seconds that all cores together were busy or stolen by the host."""
    columns = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1 : 1 + _GUEST]
    busy = [int(ticks) for at, ticks in enumerate(columns) if at not in (_IDLE, _IO_WAIT)]
    return sum(busy) / _TICKS
