"""The kernels of a run on a CUDA device, recorded by torch.profiler, and the gaps between them."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

_SHOWN = 15
_NAME_CHARACTERS = 60


class Kernel(NamedTuple):
    """A kernel or copy; times are in microseconds on one clock."""

    name: str
    began: float
    ended: float


def why_not() -> str:
    """Why kernels cannot be recorded here; empty if they can."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    import torch

    return "" if torch.cuda.is_available() else "PyTorch sees no CUDA device"


def recorded(action: Callable[[], object], activity: str = "CUDA") -> list[Kernel]:
    """The kernels that `action` ran, by start time. It runs twice, as the profiler warms up."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        with profile(activities=[getattr(ProfilerActivity, activity)]) as profiler:
            action()
    kernels = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == activity
    ]
    return sorted(kernels, key=lambda kernel: kernel.began)


def table(kernels: Sequence[Kernel]) -> str:
    """Kernels by name, the largest total time first; above them, the gaps between kernels."""
    if not kernels:
        return "  no kernels were recorded"
    idle, gaps, busy_until = 0.0, 0, kernels[0].began
    for kernel in kernels:
        if kernel.began > busy_until:
            idle, gaps = idle + kernel.began - busy_until, gaps + 1
        busy_until = max(busy_until, kernel.ended)
    whole = busy_until - kernels[0].began
    times: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        times[kernel.name].append(kernel.ended - kernel.began)
    ordered = sorted(times.items(), key=lambda item: -sum(item[1]))
    rest = [time for _, spent in ordered[_SHOWN:] for time in spent]
    lines = [
        f"  {len(kernels)} kernels within {whole / 1e3:.2f} ms; {idle / 1e3:.2f} ms of that in "
        f"{gaps} gaps between them",
        f"  {'us':>9} {'share':>6} {'calls':>6}  kernel",
    ]
    for name, spent in [*ordered[:_SHOWN], *([("all others", rest)] if rest else [])]:
        name = name if len(name) <= _NAME_CHARACTERS else f"{name[: _NAME_CHARACTERS - 1]}…"
        lines.append(f"  {sum(spent):9.1f} {sum(spent) / whole:6.1%} {len(spent):6}  {name}")
    return "\n".join(lines)
