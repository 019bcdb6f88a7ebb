"""The last product: from the hidden state of each row's last token to the logits.

Only the last token's logits are ever sampled, and the product with the vocabulary is the largest of
the graph, so the others are dropped before it.
"""

from __future__ import annotations

import numpy as np

from generator_svc.export.errors import ExportError
from generator_svc.export.graph.graph import Graph
from generator_svc.graphs import LAST_TOKEN, LOGITS_OF

HEAD = "/lm_head/MatMul"
EMBEDDING = "/model/embed_tokens/Gather"


def keep_last_token(graph: Graph, hidden_size: int) -> None:
    """Makes the logits [batch, 1, vocabulary]."""
    head = graph.node(HEAD)
    if head is None:
        raise ExportError(f"the traced graph has no {HEAD}: this head is not known")
    head.input[0] = last_token(graph, head.input[0], hidden_size)
    logits = next(value for value in graph.model.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_value = 1
    graph.finish()


def last_token(graph: Graph, hidden: str, hidden_size: int) -> str:
    """Of `hidden` [batch, sequence, hidden size], each row's last token: [batch, 1, hidden size].

    Its index is that of the last one in the row's mask, where the mask is no longer than the new
    tokens, as with prompts that are padded to the right. With a past, the last new token is meant:
    there only the first columns of the mask are counted, as many as there are new tokens.
    """
    entry = graph.model.metadata_props.add()
    entry.key, entry.value = LOGITS_OF, LAST_TOKEN
    name = "/lm_head/last"
    zero, one = (graph.constant(f"{name}/{n}", np.array([n], np.int64)) for n in (0, 1))
    width = graph.constant(f"{name}/width", np.array([1, 1, hidden_size], np.int64))
    shape = graph.add("Shape", f"{name}/Shape", ["input_ids"], start=1, end=2)
    mask = graph.add("Slice", f"{name}/Slice", ["attention_mask", zero, shape, one])
    count = graph.add("ReduceSum", f"{name}/ReduceSum", [mask, one], keepdims=1)
    index = graph.add("Sub", f"{name}/Sub", [count, one])
    column = graph.add("Unsqueeze", f"{name}/Unsqueeze", [index, one])
    indices = graph.add("Expand", f"{name}/Expand", [column, width])
    return graph.add("GatherElements", f"{name}/GatherElements", [hidden, indices], axis=1)


def share_embedding(graph: Graph) -> None:
    """Lets a floating-point head read the embedding itself, transposed within the product."""
    head, table = graph.nodes[HEAD], graph.nodes[EMBEDDING].input[0]
    axis = graph.constant("/lm_head/axis", np.array([1], np.int64))
    rows = graph.add("Squeeze", "/lm_head/Squeeze", [head.input[0], axis])
    product = graph.add("Gemm", "/lm_head/Gemm", [rows, table], transB=1)
    graph.remove([head])
    graph.add("Unsqueeze", "/lm_head/Unsqueeze", [product, axis], ["logits"])
    graph.finish()
