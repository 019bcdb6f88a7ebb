"""The numbers and the traced modules that the graph passes need. Knows no ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class LayerAttention:
    """The attributes of one layer's GroupQueryAttention.

    `window` counts the keys a query sees, its own included; None is all of them.
    """

    scale: float
    window: int | None


@dataclass(frozen=True)
class Decoder:
    """Shape of a decoder-only model.

    `cos` and `sin` are float32 of shape [context, rotary size / 2], already multiplied by the
    attention scaling that some rope types ask for.
    """

    family: str
    num_attention_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    context_length: int
    vocab_size: int
    norm_epsilon: float
    tied_embeddings: bool
    layers: tuple[LayerAttention, ...]
    cos: np.ndarray[Any, Any]
    sin: np.ndarray[Any, Any]

    @property
    def num_layers(self) -> int:
        return len(self.layers)
