"""Weights in 8 or 4 bits, activations in float, by ONNX Runtime's own quantiser.

Eight bits: symmetric, round to nearest. Four bits: k-quant, which loses much less than rounding,
with the head still in eight bits.
"""

from __future__ import annotations

from typing import Any

from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

from generator_svc.export.checkpoint import quiet_libraries
from generator_svc.export.graph import Graph
from generator_svc.export.head import HEAD

BLOCK_SIZE = 32
# Products may be computed in int8: each row of activations is quantised by itself.
ACCURACY_LEVEL = 4


def quantize_weights(graph: Graph, bits: int) -> Graph:
    """Swaps every product with a constant matrix for MatMulNBits; node names stay."""
    assert bits in (4, 8)
    if bits == 8:
        return _quantize(graph, _eight_bits(), keep=[])
    others = [node.name for node in graph.nodes.values() if node.name != HEAD]
    graph = _quantize(graph, _eight_bits(), keep=others)
    four = KQuantWeightOnlyQuantConfig()
    return _quantize(graph, four, keep=[])


def _eight_bits() -> DefaultWeightOnlyQuantConfig:
    return DefaultWeightOnlyQuantConfig(
        block_size=BLOCK_SIZE, is_symmetric=True, accuracy_level=ACCURACY_LEVEL, bits=8
    )


def _quantize(graph: Graph, config: Any, keep: list[str]) -> Graph:
    """`keep` names nodes to leave alone."""
    names = {node.output[0]: node.name for node in graph.nodes.values()}
    with quiet_libraries():
        quantizer = MatMulNBitsQuantizer(
            graph.model,
            bits=4,
            block_size=BLOCK_SIZE,
            accuracy_level=ACCURACY_LEVEL,
            nodes_to_exclude=keep,
            algo_config=config,
        )
        quantizer.process()
    model = quantizer.model.model
    for node in model.graph.node:
        node.name = names.get(node.output[0], node.name)
    return Graph(model)
