"""Activations, KV cache and unquantised weights in float16, for CUDA. Logits stay float32."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, numpy_helper

from generator_svc.export.graph.graph import Graph
from generator_svc.export.weights.packing import MAX_HALF

GLOBAL_SCALES = slice(15, 17)  # inputs of QMoE


def to_half(graph: Graph) -> None:
    """Converts every float32 tensor of the graph to float16.

    Except the logits, and the scales of whole experts, which the operator takes in float32 only.
    """
    kept = {
        name
        for node in graph.nodes.values()
        if node.op_type == "QMoE"
        for name in node.input[GLOBAL_SCALES]
    }
    for name, tensor in list(graph.initializers.items()):
        if tensor.data_type != TensorProto.FLOAT or name in kept:
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.data_type = TensorProto.FLOAT16
        else:
            value = np.clip(numpy_helper.to_array(tensor), -MAX_HALF, MAX_HALF)
            graph.initializers[name] = numpy_helper.from_array(value.astype(np.float16), name)
    for output in (output for packing in graph.packings for output in packing.outputs):
        if output.data_type == TensorProto.FLOAT:
            output.data_type = TensorProto.FLOAT16
    for node in graph.nodes.values():
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
            assert attribute.t.data_type != TensorProto.FLOAT, f"{node.name} holds a constant"
    for value in [*graph.model.graph.input, *graph.model.graph.output]:
        kind = value.type.tensor_type
        if kind.elem_type == TensorProto.FLOAT and value.name != "logits":
            kind.elem_type = TensorProto.FLOAT16
    producer = graph.producer("logits")
    assert producer is not None
    producer.output[0] = "/lm_head/logits_half"
    graph.add("Cast", "/lm_head/Cast", [producer.output[0]], ["logits"], to=TensorProto.FLOAT)
    graph.finish()
