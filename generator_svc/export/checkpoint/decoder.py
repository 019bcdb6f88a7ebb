"""What the graph passes need to know of the model. Knows nothing about ONNX."""

from __future__ import annotations

from dataclasses import dataclass

from generator_svc.export.checkpoint.experts import ExpertMatrices
from generator_svc.export.weights.matrix import Array


@dataclass(frozen=True)
class LayerAttention:
    """The attributes of one layer's GroupQueryAttention.

    `window` is the number of keys that a query sees, its own included; None means all. `sinks`,
    float32 [query heads], are logits that take part in each softmax but have no value.
    """

    scale: float
    window: int | None
    sinks: Array | None = None


@dataclass(frozen=True)
class Experts:
    """MLPs of which the router chooses `chosen` for each token, with gpt-oss's clamped SwiGLU.

    `layers` has the joined gate and up matrices, and the down matrices, of each layer. From gate g,
    clamped to at most `limit`, and up u, clamped to ±`limit`: (u + 1) * g * sigmoid(alpha * g).
    """

    chosen: int
    alpha: float
    limit: float
    layers: tuple[tuple[ExpertMatrices, ExpertMatrices], ...]

    @property
    def is_mxfp4(self) -> bool:
        return self.layers[0][0].is_mxfp4


@dataclass(frozen=True)
class Decoder:
    """Shape of a decoder-only model.

    `cos` and `sin` are float32 [context, rotary size / 2], already multiplied by the attention
    scaling of some rope types.
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
    cos: Array
    sin: Array
    experts: Experts | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)
