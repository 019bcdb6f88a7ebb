"""What processes used: processor time and peak memory, from /proc."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """Processor seconds so far, and the most memory ever held, in bytes."""

    cpu_seconds: float
    peak_bytes: int


def usage(pid: int) -> Usage:
    """Of one process, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    status = Path(f"/proc/{pid}/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return Usage((int(fields[11]) + int(fields[12])) / _TICKS, int(peak.split()[1]) * 1024)


def usages(pids: Mapping[str, int]) -> dict[str, Usage]:
    return {name: usage(pid) for name, pid in pids.items()}
