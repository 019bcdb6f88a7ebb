"""Weights in 8 or 4 bits, activations in float.

Eight bits, by ONNX Runtime's own quantiser: round to nearest, asymmetric in blocks of 32. The 16
evenly spaced levels of a Q4_1 block are among the 256 of such a block but for a shift, so weights
from a GGUF file pass almost unchanged. Four bits: its k-quant, which loses much less than rounding.

The head is done here, in 8 bits with either precision: symmetric, with the largest magnitude of a
block at 127. That reproduces Q8_0, which is what GGUF files keep the embedding in, exactly.
"""

from __future__ import annotations

from typing import Any

from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

from generator_svc.export.checkpoint.checkpoint import quiet_libraries
from generator_svc.export.graph.graph import MICROSOFT, Graph
from generator_svc.export.graph.head import HEAD
from generator_svc.export.weights.blocks import BLOCK_SIZE
from generator_svc.export.weights.int8 import quantize_symmetric

# Products may be computed in int8: each row of activations is quantised by itself.
ACCURACY_LEVEL = 4


def quantize_weights(graph: Graph, bits: int) -> Graph:
    """Swaps every product with a constant matrix for MatMulNBits; node names stay."""
    assert bits in (4, 8)
    _quantize_head(graph)
    if bits == 4:
        graph = _quantize_others(graph, KQuantWeightOnlyQuantConfig(), keep=_odd_products(graph))
    config = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK_SIZE, is_symmetric=False, accuracy_level=ACCURACY_LEVEL, bits=8
    )
    return _quantize_others(graph, config, keep=[])


def _odd_products(graph: Graph) -> list[str]:
    """Products over an odd number of blocks, whose zero points k-quant fails to pack.

    They are left for eight bits.
    """
    return [
        node.name
        for node in graph.nodes.values()
        if node.op_type == "MatMul"
        and node.input[1] in graph.initializers
        and -(-graph.initializers[node.input[1]].dims[0] // BLOCK_SIZE) % 2
    ]


def _quantize_head(graph: Graph) -> None:
    head = graph.nodes[HEAD]
    columns, rows = graph.initializers[head.input[1]].dims
    quantized, scales = quantize_symmetric(graph.array(head.input[1]).T)
    graph.remove([head])
    graph.add(
        "MatMulNBits",
        HEAD,
        [
            head.input[0],
            graph.constant("lm_head.weight_Q8", quantized),
            graph.constant("lm_head.weight_scales", scales),
        ],
        list(head.output),
        domain=MICROSOFT,
        K=columns,
        N=rows,
        bits=8,
        block_size=BLOCK_SIZE,
        accuracy_level=ACCURACY_LEVEL,
    )
    graph.finish()


def _quantize_others(graph: Graph, config: Any, keep: list[str]) -> Graph:
    """`keep` names the products to leave as they are."""
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
        node.name = names[node.output[0]]
    return Graph(model)
