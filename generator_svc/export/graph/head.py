"""The LM head: from hidden states to logits, for selected tokens only.

Only the last token's logits are ever sampled from, and the head is the largest product of the
graph, so the other tokens are dropped before it, unless a run asks for them.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from generator_svc.export.errors import ExportError
from generator_svc.export.graph.graph import Graph
from generator_svc.graphs import LAST_TOKEN, LOGITS_OF, TOKENS_FROM_END

HEAD = "/lm_head/MatMul"
EMBEDDING = "/model/embed_tokens/Gather"


def select_logits(graph: Graph, hidden_size: int) -> None:
    """Reduces the logits to [batch, selected tokens, vocabulary].

    The output is declared with one token, which tells onnxruntime-genai to expect no others.
    """
    head = graph.node(HEAD)
    if head is None:
        raise ExportError(f"the traced graph has no {HEAD}: unsupported head")
    head.input[0] = select_tokens(graph, head.input[0], hidden_size)
    logits = next(value for value in graph.model.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_value = 1
    graph.finish()


def select_tokens(graph: Graph, hidden: str, hidden_size: int) -> str:
    """Selects from `hidden` the tokens whose logits are returned: [batch, sequence, hidden size]
    to [batch, selected tokens, hidden size].

    The input TOKENS_FROM_END, int64 [selected tokens], counts them from each row's last token, 1.
    That is also the default, so callers that do not know the input get the last token only.

    The last token of a row is found by counting the ones in its mask, which works for prompts
    padded on the right. With a past, it is the last new token: only as many columns of the mask are
    counted as there are new tokens.
    """
    entry = graph.model.metadata_props.add()
    entry.key, entry.value = LOGITS_OF, LAST_TOKEN
    name = "/lm_head/last"
    zero, one, two = (graph.constant(f"{name}/{n}", np.array([n], np.int64)) for n in (0, 1, 2))
    width = graph.constant(f"{name}/width", np.array([1, 1, hidden_size], np.int64))
    from_end = graph.constant(TOKENS_FROM_END, np.array([1], np.int64))
    graph.model.graph.input.append(
        helper.make_tensor_value_info(from_end, TensorProto.INT64, ["wanted_tokens"])
    )
    shape = graph.add("Shape", f"{name}/Shape", ["input_ids"], start=1, end=2)
    mask = graph.add("Slice", f"{name}/Slice", ["attention_mask", zero, shape, one])
    count = graph.add("ReduceSum", f"{name}/ReduceSum", [mask, one], keepdims=1)
    index = graph.add("Sub", f"{name}/Sub", [count, from_end])
    column = graph.add("Unsqueeze", f"{name}/Unsqueeze", [index, two])
    indices = graph.add("Expand", f"{name}/Expand", [column, width])
    return graph.add("GatherElements", f"{name}/GatherElements", [hidden, indices], axis=1)


def share_embedding(graph: Graph) -> None:
    """Makes a floating-point head read the embedding itself, transposed within the product."""
    head, table = graph.nodes[HEAD], graph.nodes[EMBEDDING].input[0]
    name = "/lm_head/shared"
    hidden = head.input[0]
    every = graph.constant(f"{name}/every", np.array([-1], np.int64))
    shape = graph.add("Shape", f"{name}/Shape", [hidden], start=0, end=2)
    width = graph.add("Shape", f"{name}/Width", [hidden], start=2)
    flat = graph.add("Concat", f"{name}/Flat", [every, width], axis=0)
    rows = graph.add("Reshape", f"{name}/Rows", [hidden, flat])
    product = graph.add("Gemm", "/lm_head/Gemm", [rows, table], transB=1)
    graph.remove([head])
    whole = graph.add("Concat", f"{name}/Whole", [shape, every], axis=0)
    graph.add("Reshape", f"{name}/Reshape", [product, whole], ["logits"])
    graph.finish()
