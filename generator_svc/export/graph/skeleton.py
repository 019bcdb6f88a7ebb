"""Restores the products that a trace without weights only marks.

The initializers have dimensions but no data: `Graph.matrices` says where that comes from. Names are
those that Optimum gives to a model with weights, on which the passes rely.
"""

from __future__ import annotations

import re
from typing import Any

from generator_svc.export.checkpoint.streamed import MARK, StreamedEmbedding, StreamedLinear
from generator_svc.export.graph.graph import Graph


def restore_products(graph: Graph, model: Any) -> None:
    """Restores all products; `model` is the PyTorch model that was traced."""
    for name, module in model.named_modules():
        if isinstance(module, StreamedLinear):
            _restore_linear(graph, name, module)
        elif isinstance(module, StreamedEmbedding):
            _restore_embedding(graph, name, module)
    graph.finish()


def node_prefix(module: str) -> str:
    """`model.layers.0.mlp.up_proj` to `/model/layers.0/mlp/up_proj`."""
    return "/" + re.sub(r"\.(?!\d)", "/", module)


def _restore_linear(graph: Graph, name: str, linear: StreamedLinear) -> None:
    prefix = node_prefix(name)
    mark = graph.nodes[f"{prefix}/{MARK}"]
    source, outputs = mark.input[0], list(mark.output)
    graph.remove([mark])
    weight = graph.weight(f"{name}.weight", linear.matrix, is_transposed=True)
    if linear.bias is None:
        graph.add("MatMul", f"{prefix}/MatMul", [source, weight], outputs)
        return
    product = graph.add("MatMul", f"{prefix}/MatMul", [source, weight])
    bias = graph.constant(f"{name}.bias", linear.bias.detach().numpy())
    graph.add("Add", f"{prefix}/Add", [bias, product], outputs)


def _restore_embedding(graph: Graph, name: str, embedding: StreamedEmbedding) -> None:
    prefix = node_prefix(name)
    nodes = graph.under(f"{prefix}/")
    outputs = list(graph.nodes[f"{prefix}/{MARK}"].output)
    graph.remove(nodes)
    table = graph.weight(f"{name}.weight", embedding.matrix)
    graph.add("Gather", f"{prefix}/Gather", [table, "input_ids"], outputs, axis=0)
