"""The largest activations of a checkpoint's linear layers on a text, channel by channel.

Knows PyTorch; knows nothing of ONNX, nor of what is done with the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from generator_svc.export.checkpoint.reading import counted
from generator_svc.export.progress import Progress, silent

# Prose, dialogue, code, data, mathematics and several languages, in about 3,000 tokens.
TEXT = Path(__file__).with_name("calibration.txt")
WINDOW = 256

# The largest absolute values, float32 [input channels], by module and layer number. Query, key
# and value read one tensor, as do gate and up: it is known by the first of them.
Ranges = dict[tuple[int, str], torch.Tensor]
OBSERVED = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj")


def calibrate(model: Any, token_ids: list[int], progress: Progress = silent) -> Ranges:
    """Runs the decoder over `token_ids` in windows, each from position 0, and keeps the extremes.

    Progress counts the bytes of weights that are done with, once for each run. All whole windows
    are one batch, since a streamed model is read anew for each run.
    """
    whole = len(token_ids) - len(token_ids) % WINDOW
    windows = torch.tensor(token_ids[:whole]).reshape(-1, WINDOW)
    both = (windows, torch.tensor([token_ids[whole:]]))
    batches = [batch for batch in both if batch.numel()]
    ranges: Ranges = {}
    counting = counted(model.model, len(batches), progress, "calibrating")
    with torch.inference_mode(), _observed(model, ranges), counting:
        for batch in batches:
            model.model(batch, use_cache=False)
    return ranges


@contextmanager
def _observed(model: Any, ranges: Ranges) -> Iterator[None]:
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(_observer(ranges, (number, name)))
        for number, layer in enumerate(model.model.layers)
        for name in OBSERVED
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _observer(ranges: Ranges, key: tuple[int, str]) -> Callable[[Any, Any], None]:
    def observe(module: Any, inputs: Any) -> None:
        largest = inputs[0].abs().flatten(0, -2).amax(0)
        ranges[key] = torch.maximum(ranges[key], largest) if key in ranges else largest

    return observe
