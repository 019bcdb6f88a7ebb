"""Joins projections that read the same tensor into one matrix product.

Query, key and value become one packed input of GroupQueryAttention; gate and up become one product
that is split afterwards. Fewer, wider products use more of the machine.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from generator_svc.export.graph.graph import Graph
from generator_svc.export.weights.matrix import Array, stack


def join_projections(graph: Graph, num_layers: int) -> None:
    """Joins what can be joined in every layer; everything else stays as it is."""
    for layer in range(num_layers):
        _join_query_key_value(graph, f"/model/layers.{layer}/self_attn")
        _join_gate_up(graph, f"/model/layers.{layer}/mlp")
    graph.finish()


def _join_query_key_value(graph: Graph, module: str) -> None:
    attention = graph.node(f"{module}/GroupQueryAttention")
    assert attention is not None
    parts = [f"{module}/{part}_proj" for part in "qkv"]
    ends = [graph.node(f"{part}/Add") or graph.node(f"{part}/MatMul") for part in parts]
    outputs = [end.output[0] for end in ends if end is not None]
    if list(attention.input[:3]) != outputs:
        return  # query and key are normalised per head first
    packed = _joined_product(graph, parts, f"{module}/qkv_proj")
    if packed is not None:
        attention.input[0], attention.input[1], attention.input[2] = packed, "", ""


def _join_gate_up(graph: Graph, module: str) -> None:
    parts = [f"{module}/gate_proj", f"{module}/up_proj"]
    if any(graph.node(f"{part}/Add") for part in parts):
        return
    products = [graph.node(f"{part}/MatMul") for part in parts]
    joined = _joined_product(graph, parts, f"{module}/gate_up_proj")
    if joined is None:
        return
    halves = [f"{module}/gate_up_proj/Split/{half}" for half in ("gate", "up")]
    graph.add("Split", f"{module}/gate_up_proj/Split", [joined], halves, axis=-1, num_outputs=2)
    for product, half in zip(products, halves, strict=True):
        assert product is not None
        graph.replace_uses(product.output[0], half)


def _joined_product(graph: Graph, parts: list[str], name: str) -> str | None:
    """One product (and one bias) for linear layers that read the same tensor, or None."""
    products = [graph.node(f"{part}/MatMul") for part in parts]
    nodes = [product for product in products if product is not None]
    if len(nodes) != len(parts) or len({node.input[0] for node in nodes}) != 1:
        return None
    biases = [_bias(graph, part) for part in parts]
    joined = stack([graph.matrices[node.input[1]] for node in nodes])
    weight = graph.weight(f"{name[1:].replace('/', '.')}.weight", joined, is_transposed=True)
    output = graph.add("MatMul", f"{name}/MatMul", [nodes[0].input[0], weight])
    present = [bias for bias in biases if bias is not None]
    if not present:
        return output
    assert len(present) == len(parts), f"{name}: only some parts have a bias"
    bias = graph.constant(f"{name[1:].replace('/', '.')}.bias", np.concatenate(present))
    return graph.add("Add", f"{name}/Add", [output, bias])


def _bias(graph: Graph, part: str) -> Array | None:
    node: NodeProto | None = graph.node(f"{part}/Add")
    if node is None:
        return None
    return graph.array(next(name for name in node.input if name in graph.initializers))
