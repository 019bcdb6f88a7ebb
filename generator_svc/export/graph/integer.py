"""Products of 8-bit integers: weight scales per output channel, statically quantised activations.

A static scale from calibration serves all rows of a product's input, so a request's results do not
depend on the rest of the batch, and quantising takes a single operator. With ONNX Runtime's
DynamicQuantizeLinear, which computes one scale per tensor, they would.

The down projection of each MLP is left to MatMulNBits: its input varies between tokens by orders of
magnitude, which one scale cannot represent, and a scale per row takes six operators.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto

from generator_svc.export.calibration.activations import Ranges
from generator_svc.export.graph.graph import MICROSOFT, Graph
from generator_svc.export.graph.observed import observed_module
from generator_svc.export.weights import int8_channels
from generator_svc.export.weights.packing import Packed, pack_matrix

LARGEST = 127
ZERO_POINT = 128  # of the activations, which are uint8


def integer_products(graph: Graph, ranges: Ranges) -> None:
    """Replaces products that read the output of a norm or attention by MatMulIntegerToFloat."""
    quantized: dict[str, str] = {}
    for product in list(graph.nodes.values()):
        observed = observed_module(product.name)
        if product.op_type == "MatMul" and observed in ranges:
            _swap(graph, product, ranges[observed], quantized)
    graph.finish()


def _swap(graph: Graph, product: NodeProto, largest: Any, quantized: dict[str, str]) -> None:
    """Products that read the same tensor share its `quantized` form."""
    source = product.input[0]
    step = graph.constant(f"{source}/step", np.array(float(largest.max()) / LARGEST, np.float32))
    zero_point = graph.constant("/integer/zero_point", np.array(ZERO_POINT, np.uint8))
    if source not in quantized:
        name = f"{source}/QuantizeLinear"
        quantized[source] = graph.add("QuantizeLinear", name, [source, step, zero_point])
    matrix = graph.matrices[product.input[1]]
    prefix = product.name[1:].removesuffix("/MatMul").replace("/", ".")
    dims = (matrix.columns, matrix.rows)
    packed = (
        Packed(f"{prefix}.weight_S8", dims, TensorProto.INT8, is_transposed=True),
        Packed(f"{prefix}.weight_scales", (matrix.rows,), TensorProto.FLOAT),
    )
    weights = graph.stream(pack_matrix(packed, matrix, int8_channels.quantize))
    inputs = [quantized[source], weights[0], step, weights[1], zero_point]
    outputs = list(product.output)
    graph.remove([product])
    graph.add("MatMulIntegerToFloat", product.name, inputs, outputs, domain=MICROSOFT)
