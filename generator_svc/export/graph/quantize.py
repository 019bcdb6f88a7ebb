"""Weight-only quantisation: weights in 8 or 4 bits, activations in float.

On the CPU, 8 bits as by ONNX Runtime's own quantiser: round to nearest, asymmetric in blocks of 32.
The 16 evenly spaced levels of a Q4_1 block are among the 256 of such a block except for a shift, so
weights from a GGUF file are almost unchanged. 4 bits: with a search in each block for the scale and
zero point with the smallest error.

On CUDA both are symmetric without zero points, as ONNX Runtime's fastest kernels for float16
activations require (fpA_intB, see Device.open). 4 bits: with a search for the scale with the
smallest error, weighted by the activations of each column if these are known.

Head and embedding have 8 bits at either precision: symmetric, with the largest magnitude of a block
at 127. That exactly reproduces Q8_0, in which GGUF files keep the embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from onnx import NodeProto, TensorProto

from generator_svc.export.calibration.activations import MeanSquares
from generator_svc.export.graph.graph import MICROSOFT, Graph
from generator_svc.export.graph.head import EMBEDDING, HEAD
from generator_svc.export.graph.observed import observed_module
from generator_svc.export.weights import int4, int8
from generator_svc.export.weights.blocks import BLOCK_SIZE
from generator_svc.export.weights.matrix import Array, Matrix
from generator_svc.export.weights.packing import Packed, pack_matrix

# Allows products to be computed in int8, with each row of activations quantised on its own.
ACCURACY_LEVEL = 4


def quantize_weights(
    graph: Graph, bits: int, is_half: bool, mean_squares: MeanSquares | None = None
) -> None:
    """Replaces every product with a streamed matrix by MatMulNBits; node names are kept.

    With `is_half`, that is on CUDA, scales will be float16 and there are no zero points.
    """
    assert bits in (4, 8)
    for node in [n for n in graph.nodes.values() if n.op_type == "MatMul"]:
        if node.input[1] not in graph.matrices:
            continue
        if node.name == HEAD or (is_half and bits == 8):
            eight = partial(int8.quantize_symmetric, is_half=is_half)
            _swap(graph, node, 8, ("Q8", "scales"), eight)
        elif is_half:
            observed = (mean_squares or {}).get(observed_module(node.name))
            squares = None if observed is None else observed.numpy()
            four = partial(int4.quantize_symmetric, is_half=True, mean_squares=squares)
            _swap(graph, node, 4, ("Q4", "scales"), four)
        elif bits == 4:
            _swap(graph, node, 4, ("Q4", "scales", "zero_points"), int4.quantize_asymmetric)
        else:
            _swap(graph, node, 8, ("Q8", "scales", "zero_points"), int8.quantize_asymmetric)
    graph.finish()


def quantize_embedding(graph: Graph, hidden_size: int, is_tied: bool, is_half: bool) -> None:
    """Replaces the lookup by one in 8-bit rows, which are those of the quantised head if tied.

    The head's rows are [vocabulary, blocks, block size], the lookup takes [vocabulary, hidden
    size]; ONNX Runtime folds the reshape into a copy when it loads the graph. An untied embedding
    has its own table, without that copy. If the hidden size is not a multiple of the block size,
    rows would be padded, so the float table is kept.
    """
    embedding = graph.nodes[EMBEDDING]
    if hidden_size % BLOCK_SIZE:
        return
    if is_tied:
        rows, scales = graph.nodes[HEAD].input[1:3]
        shape = graph.constant("/model/embed_tokens/shape", np.array([-1, hidden_size], np.int64))
        table = graph.add("Reshape", "/model/embed_tokens/Reshape", [rows, shape])
    else:
        name = embedding.input[0]
        matrix = graph.matrices[name]
        dims = (matrix.rows, hidden_size)
        outputs = (
            Packed(f"{name}_Q8", dims, TensorProto.UINT8),
            Packed(f"{name}_scales", (matrix.rows, hidden_size // BLOCK_SIZE), TensorProto.FLOAT),
        )
        pack = partial(int8.quantize_symmetric, is_half=is_half)
        table, scales = graph.stream(pack_matrix(outputs, matrix, pack))
    graph.remove([embedding])
    graph.add(
        "GatherBlockQuantized",
        EMBEDDING,
        [table, embedding.input[1], scales],
        list(embedding.output),
        domain=MICROSOFT,
        bits=8,
        block_size=BLOCK_SIZE,
        gather_axis=0,
        quantize_axis=1,
    )
    graph.finish()


def _swap(
    graph: Graph,
    node: NodeProto,
    bits: int,
    parts: tuple[str, ...],
    pack: Callable[[Array], tuple[Array, ...]],
) -> None:
    matrix = graph.matrices[node.input[1]]
    weights = _stream(graph, node.input[1], matrix, parts, pack)
    graph.remove([node])
    graph.add(
        "MatMulNBits",
        node.name,
        [node.input[0], *weights],
        list(node.output),
        domain=MICROSOFT,
        K=matrix.columns,
        N=matrix.rows,
        bits=bits,
        block_size=BLOCK_SIZE,
        accuracy_level=ACCURACY_LEVEL,
    )


def _stream(
    graph: Graph,
    name: str,
    matrix: Matrix,
    parts: tuple[str, ...],
    pack: Callable[[Array], tuple[Array, ...]],
) -> list[str]:
    """Declares the initializers that `pack` makes: blocks of levels, scales and zero points."""
    blocks = -(-matrix.columns // BLOCK_SIZE)
    outputs = {
        "Q8": Packed(f"{name}_Q8", (matrix.rows, blocks, BLOCK_SIZE), TensorProto.UINT8),
        "Q4": Packed(f"{name}_Q4", (matrix.rows, blocks, BLOCK_SIZE // 2), TensorProto.UINT8),
        "scales": Packed(f"{name}_scales", (matrix.rows, blocks), TensorProto.FLOAT),
    }
    bytes_a_row = -(-blocks // 2) if parts[0] == "Q4" else blocks
    outputs["zero_points"] = Packed(
        f"{name}_zero_points", (matrix.rows, bytes_a_row), TensorProto.UINT8
    )
    return graph.stream(pack_matrix(tuple(outputs[part] for part in parts), matrix, pack))
