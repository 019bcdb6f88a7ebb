"""The last product: from the hidden state of the last position to the logits.

Only the last position's logits are ever sampled, and the product with the vocabulary is the
largest of the graph, so the others are dropped before it.
"""

from __future__ import annotations

import numpy as np

from generator_svc.export.errors import ExportError
from generator_svc.export.graph.graph import Graph

HEAD = "/lm_head/MatMul"
EMBEDDING = "/model/embed_tokens/Gather"


def keep_last_position(graph: Graph) -> None:
    """Makes the logits [batch, 1, vocabulary]."""
    head = graph.node(HEAD)
    if head is None:
        raise ExportError(f"the traced graph has no {HEAD}: this head is not known")
    bounds = {"starts": -1, "ends": np.iinfo(np.int64).max, "axes": 1}
    names = [
        graph.constant(f"/lm_head/last/{name}", np.array([value], np.int64))
        for name, value in bounds.items()
    ]
    head.input[0] = graph.add("Slice", "/lm_head/last/Slice", [head.input[0], *names])
    logits = next(value for value in graph.model.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_value = 1
    graph.finish()


def share_embedding(graph: Graph) -> None:
    """Lets a floating-point head read the embedding itself, transposed within the product."""
    head, table = graph.nodes[HEAD], graph.nodes[EMBEDDING].input[0]
    axis = graph.constant("/lm_head/axis", np.array([1], np.int64))
    rows = graph.add("Squeeze", "/lm_head/Squeeze", [head.input[0], axis])
    product = graph.add("Gemm", "/lm_head/Gemm", [rows, table], transB=1)
    graph.remove([head])
    graph.add("Unsqueeze", "/lm_head/Unsqueeze", [product, axis], ["logits"])
    graph.finish()
