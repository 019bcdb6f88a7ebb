"""Progress of a run of a streamed model, in bytes of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from generator_svc.export.checkpoint.streamed import StreamedLinear
from generator_svc.export.checkpoint.streamed_experts import StreamedExperts
from generator_svc.export.progress import Progress

_FLOAT_BYTES = 4  # float32, whatever the type in the file


def weight_bytes(module: Any) -> int:
    """Bytes of all matrices that `module` multiplies by, as float32."""
    return sum(_own_bytes(part) for part in module.modules())


def _own_bytes(module: Any) -> int:
    if isinstance(module, StreamedLinear):
        return _FLOAT_BYTES * module.matrix.rows * module.matrix.columns
    if isinstance(module, StreamedExperts):
        parts = (module.gate_up, module.down)
        return _FLOAT_BYTES * sum(part.count * part.rows * part.columns for part in parts)
    return 0


@contextmanager
def counted(model: Any, runs: int, progress: Progress, step: str) -> Iterator[None]:
    """Reports to `progress` the bytes of weights used, during `runs` runs of `model`."""
    done, total = 0, runs * weight_bytes(model)

    def report(count: int, *_: Any) -> None:
        nonlocal done
        done += count
        progress(step, done, total)

    streamed = [(part, _own_bytes(part)) for part in model.modules()]
    hooks = [
        part.register_forward_hook(partial(report, count)) for part, count in streamed if count
    ]
    progress(step, 0, total)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
