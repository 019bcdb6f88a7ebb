"""Moves the range of activations into the weights, where 8 bits can represent it.

SmoothQuant (Xiao et al., ICML 2023): channel j of a product's input is divided by

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

and row j of its weights multiplied by it, which changes nothing but rounding. The division costs
nothing at run time: it is folded into what makes the input, a norm's weight or the value projection
of the attention.
"""

from __future__ import annotations

from typing import Any

import torch

from generator_svc.export.calibration.activations import Ranges
from generator_svc.export.checkpoint.reading import weight_bytes
from generator_svc.export.progress import Progress, silent
from generator_svc.export.weights.matrix import scale as scale_matrix

# How much of the range moves into the weights, by where the input comes from: measured on
# SmolLM2-135M, see docs/log.md.
NORM_ALPHA, VALUE_ALPHA = 0.75, 0.7
_TINY = 1e-5


def smooth(model: Any, ranges: Ranges, progress: Progress = silent) -> None:
    """Rescales `model` and its `ranges` in place.

    Progress counts the bytes of weights that have been processed.
    """
    with torch.no_grad():
        _smooth_layers(model.model.layers, ranges, progress)


def _smooth_layers(layers: Any, ranges: Ranges, progress: Progress) -> None:
    done, total = 0, weight_bytes(layers)
    for number, layer in enumerate(layers):
        progress("smoothing", done, total)
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        _smooth_norm(layer.input_layernorm, qkv, ranges, (number, "self_attn.q_proj"))
        gate_up = [mlp.gate_proj, mlp.up_proj]
        norm = layer.post_attention_layernorm
        _smooth_norm(norm, gate_up, ranges, (number, "mlp.gate_proj"))
        _smooth_values(attention, ranges, (number, "self_attn.o_proj"))
        done += weight_bytes(layer)
    progress("smoothing", done, total)


def _smooth_norm(norm: Any, readers: list[Any], ranges: Ranges, key: tuple[int, str]) -> None:
    scale = _scale(ranges[key], _largest(readers), NORM_ALPHA)
    norm.weight /= scale
    for reader in readers:
        reader.matrix = scale_matrix(reader.matrix, columns=scale.numpy())
    ranges[key] = ranges[key] / scale


def _smooth_values(attention: Any, ranges: Ranges, key: tuple[int, str]) -> None:
    """Query heads that share a value head share its scales."""
    values, output = attention.v_proj, attention.o_proj
    group = output.in_features // values.out_features
    heads = values.out_features // attention.head_dim
    shape = (heads, group, attention.head_dim)
    largest = ranges[key].reshape(shape).amax(1).flatten()
    weights = _largest([output]).reshape(shape).amax(1).flatten()
    scale = _scale(largest, weights, VALUE_ALPHA)
    values.matrix = scale_matrix(values.matrix, rows=(1 / scale).numpy())
    if values.bias is not None:
        values.bias /= scale
    repeated = scale.reshape(heads, 1, -1).expand(shape).flatten()
    output.matrix = scale_matrix(output.matrix, columns=repeated.numpy())
    ranges[key] = ranges[key] / repeated


def _largest(readers: list[Any]) -> torch.Tensor:
    """Largest absolute weight of each input channel, over all layers that read it."""
    slices = (rows() for reader in readers for rows in reader.matrix.slices())
    return torch.stack([torch.from_numpy(rows).abs().amax(0) for rows in slices]).amax(0)


def _scale(activations: torch.Tensor, weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """s above, with a geometric mean of 1."""
    spread = activations.clamp(min=_TINY) ** alpha / weights.clamp(min=_TINY) ** (1 - alpha)
    return spread / spread.log().mean().exp()
