"""Scales the residual stream of gpt-oss down to fit into float16.

It grows from layer to layer: in gpt-oss-120b beyond float16's 65,504, and then every logit is NaN
(https://github.com/microsoft/onnxruntime-genai/pull/2444). A norm is invariant to a factor of its
input if its epsilon is multiplied by the factor's square. So everything that is added to the
stream, the embedding and the outputs of attention and experts, is multiplied by 2**-6, which is
exact.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from generator_svc.export.checkpoint.checkpoint import Checkpoint
from generator_svc.export.weights.matrix import Matrix, scale

# Allows values up to 4.2 million. From -10 down, float16 has too few bits left for small values.
EXPONENT = -6
FACTOR = 2.0**EXPONENT


def scale_residual(checkpoint: Checkpoint) -> Checkpoint:
    """Scales the residual stream without changing the logits; modifies the model in place."""
    decoder, model = checkpoint.decoder, checkpoint.model
    assert decoder.experts is not None
    model.model.embed_tokens.matrix = _scaled(model.model.embed_tokens.matrix)
    with torch.no_grad():
        for layer in model.model.layers:
            output = layer.self_attn.o_proj
            output.matrix = _scaled(output.matrix)
            if output.bias is not None:
                output.bias *= FACTOR
            layer.mlp.experts.down = replace(layer.mlp.experts.down, exponent=EXPONENT)
            layer.input_layernorm.variance_epsilon *= FACTOR**2
            layer.post_attention_layernorm.variance_epsilon *= FACTOR**2
    model.model.norm.variance_epsilon *= FACTOR**2
    layers = tuple(
        (gate_up, replace(down, exponent=EXPONENT)) for gate_up, down in decoder.experts.layers
    )
    decoder = replace(
        decoder,
        norm_epsilon=decoder.norm_epsilon * FACTOR**2,
        tied_embeddings=False,  # the head is not scaled
        experts=replace(decoder.experts, layers=layers),
    )
    return replace(checkpoint, decoder=decoder)


def _scaled(matrix: Matrix) -> Matrix:
    return scale(matrix, columns=np.full(matrix.columns, FACTOR, np.float32))
