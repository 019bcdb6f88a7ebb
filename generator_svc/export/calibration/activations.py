"""How large the inputs of a checkpoint's linear layers are on a text, channel by channel.

Knows PyTorch; knows nothing about ONNX, nor about what is done with the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from generator_svc.export.checkpoint.reading import counted
from generator_svc.export.progress import Progress, silent

# Prose, dialogue, code, data, mathematics and several languages, in about 3,000 tokens.
TEXT = Path(__file__).with_name("calibration.txt")
WINDOW = 256

# The largest absolute values, float32 [input channels], by layer number and module. Query, key and
# value read the same tensor, as do gate and up: it is observed at the first of them.
Ranges = dict[tuple[int, str], torch.Tensor]
OBSERVED = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj")

# The mean squares in the same form, with the input of the MLP's down projection too.
MeanSquares = dict[tuple[int, str], torch.Tensor]


def calibrate(model: Any, token_ids: list[int], progress: Progress = silent) -> Ranges:
    """Runs the decoder over `token_ids` in windows, each from position 0, and keeps the maxima.

    Progress counts the bytes of weights that have been used, once per run. All whole windows are
    one batch, since the weights of a streamed model are read again for each run.
    """
    ranges: Ranges = {}

    def keep_largest(key: tuple[int, str], rows: torch.Tensor) -> None:
        largest = rows.abs().amax(0)
        ranges[key] = torch.maximum(ranges[key], largest) if key in ranges else largest

    _run(model, _batches(token_ids), OBSERVED, keep_largest, progress)
    return ranges


def mean_squares(model: Any, token_ids: list[int], progress: Progress = silent) -> MeanSquares:
    """Runs the decoder over the whole windows of `token_ids`, or over all of it if shorter."""
    found: MeanSquares = {}

    def keep_mean(key: tuple[int, str], rows: torch.Tensor) -> None:
        found[key] = rows.square().mean(0)

    _run(model, _batches(token_ids)[:1], (*OBSERVED, "mlp.down_proj"), keep_mean, progress)
    return found


def _batches(token_ids: list[int]) -> list[torch.Tensor]:
    """One batch of all whole windows, and one of the rest."""
    whole = len(token_ids) - len(token_ids) % WINDOW
    windows = torch.tensor(token_ids[:whole]).reshape(-1, WINDOW)
    both = (windows, torch.tensor([token_ids[whole:]]))
    return [batch for batch in both if batch.numel()]


def _run(
    model: Any,
    batches: list[torch.Tensor],
    names: Sequence[str],
    keep: Callable[[tuple[int, str], torch.Tensor], None],
    progress: Progress,
) -> None:
    """Passes the inputs of the modules `names` to `keep`, float32 [tokens, channels]."""
    counting = counted(model.model, len(batches), progress, "calibrating")
    with torch.inference_mode(), _observed(model, names, keep), counting:
        for batch in batches:
            model.model(batch, use_cache=False)


@contextmanager
def _observed(
    model: Any, names: Sequence[str], keep: Callable[[tuple[int, str], torch.Tensor], None]
) -> Iterator[None]:
    def observer(key: tuple[int, str]) -> Callable[[Any, Any], None]:
        return lambda module, inputs: keep(key, inputs[0].flatten(0, -2))

    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(observer((number, name)))
        for number, layer in enumerate(model.model.layers)
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
