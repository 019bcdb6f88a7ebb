"""This machine's NVIDIA GPUs, as reported by nvidia-smi."""

from __future__ import annotations

import subprocess

_FIELDS = "name,driver_version,memory.free,memory.total"
_SECONDS = 20  # without its persistence daemon, the driver is loaded for each query


def gpus() -> list[str]:
    """One line per GPU; none without a driver and its nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.split(", ") for line in done.stdout.splitlines())
    return [
        f"{name}, driver {driver}, {free} of {total} free" for name, driver, free, total in rows
    ]
