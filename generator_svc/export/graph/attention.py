"""Replaces every traced attention by one com.microsoft.GroupQueryAttention.

Cut points are found by name: its inputs are the outputs of `…/self_attn/{q,k,v}_proj` (or `q_norm`
and `k_norm` in families that have them), its output is the input of `…/self_attn/o_proj`. The
operator includes rotary embedding, masking and the KV cache, so everything traced in between is
dropped.

Contract of the new graph: `attention_mask` is [batch, total], and each row sums to the row's own
length; past and present may be the same buffer, longer than what is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from generator_svc.export.checkpoint.decoder import Decoder
from generator_svc.export.errors import ExportError
from generator_svc.export.graph.graph import MICROSOFT, Graph

COS, SIN = "cos_cache", "sin_cache"
LENGTHS, TOTAL = "/attention/seqlens_k", "/attention/total_sequence_length"


def swap_attention(graph: Graph, decoder: Decoder) -> None:
    """Rewrites all layers; removes the input `position_ids`."""
    graph.constant(COS, decoder.cos)
    graph.constant(SIN, decoder.sin)
    add_lengths(graph)
    for layer in range(decoder.num_layers):
        _swap_layer(graph, decoder, layer)
    _declare_inputs_and_outputs(graph, decoder)
    graph.finish()


def projection_output(graph: Graph, module: str) -> NodeProto:
    """The node that makes the output of the linear layer `module`."""
    for suffix in ("/Add", "/MatMul"):
        node = graph.node(module + suffix)
        if node is not None:
            return node
    raise ExportError(f"the traced graph has no {module}: unsupported attention")


def add_lengths(graph: Graph) -> None:
    """Adds `seqlens_k`, int32 [batch]: index of each row's last key; and the mask's width, int32.

    The operator takes the width as a scalar in CPU memory, hence Shape.
    """
    axis = graph.constant("/attention/axis", np.array([1], np.int64))
    one = graph.constant("/attention/one", np.array(1, np.int64))
    index = graph.constant("/attention/index", np.array(1, np.int64))
    total = graph.add("ReduceSum", "/attention/ReduceSum", ["attention_mask", axis], keepdims=0)
    last = graph.add("Sub", "/attention/Sub", [total, one])
    graph.add("Cast", "/attention/Cast", [last], [LENGTHS], to=TensorProto.INT32)
    shape = graph.add("Shape", "/attention/Shape", ["attention_mask"])
    width = graph.add("Gather", "/attention/Gather", [shape, index], axis=0)
    graph.add("Cast", "/attention/Cast_1", [width], [TOTAL], to=TensorProto.INT32)


def _swap_layer(graph: Graph, decoder: Decoder, layer: int) -> None:
    module = f"/model/layers.{layer}/self_attn"
    query, key = (_query_or_key(graph, module, part, decoder) for part in "qk")
    value = projection_output(graph, f"{module}/v_proj").output[0]
    after = graph.node(f"{module}/o_proj/MatMul")
    if after is None:
        raise ExportError(f"the traced graph has no {module}/o_proj: unsupported attention")
    present = [f"present.{layer}.key", f"present.{layer}.value"]
    for name in present:
        _free_output(graph, name)
    past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
    inputs = [query, key, value, *past, LENGTHS, TOTAL, COS, SIN]
    sinks = decoder.layers[layer].sinks
    if sinks is not None:  # after position_ids and attention_bias
        inputs += ["", "", graph.constant(f"model.layers.{layer}.self_attn.sinks", sinks)]
    after.input[0] = graph.add(
        "GroupQueryAttention",
        f"{module}/GroupQueryAttention",
        inputs,
        [f"{module}/GroupQueryAttention/output_0", *present],
        domain=MICROSOFT,
        **_attributes(decoder, layer),
    )


def _attributes(decoder: Decoder, layer: int) -> dict[str, Any]:
    attention = decoder.layers[layer]
    attributes: dict[str, Any] = {
        "num_heads": decoder.num_attention_heads,
        "kv_num_heads": decoder.num_kv_heads,
        "scale": attention.scale,
        "do_rotary": 1,
        "rotary_interleaved": 0,
    }
    if attention.window is not None:
        attributes["local_window_size"] = attention.window
    return attributes


def _query_or_key(graph: Graph, module: str, part: str, decoder: Decoder) -> str:
    """The tensor [batch, sequence, heads · head size] that the operator rotates."""
    norm = f"{module}/{part}_norm/"
    if not graph.under(norm):
        return str(projection_output(graph, f"{module}/{part}_proj").output[0])
    heads = decoder.num_attention_heads if part == "q" else decoder.num_kv_heads
    flat = graph.constant(
        f"/attention/flat_{part}", np.array([0, 0, heads * decoder.head_size], np.int64)
    )
    normed = module_output(graph, norm)
    return graph.add("Reshape", f"{module}/{part}_norm_flat/Reshape", [normed, flat])


def module_output(graph: Graph, prefix: str) -> str:
    """The one tensor made under `prefix` that is not read under it."""
    nodes = graph.under(prefix)
    read_inside = {name for node in nodes for name in node.input}
    leaving = [name for node in nodes for name in node.output if name not in read_inside]
    assert len(leaving) == 1, f"{prefix} has outputs {leaving}"
    return str(leaving[0])


def _free_output(graph: Graph, name: str) -> None:
    """Renames a graph output at its traced producer, since it is about to get a new one."""
    producer = graph.producer(name)
    assert producer is not None, f"no node produces {name}"
    index = list(producer.output).index(name)
    producer.output[index] = f"{name}/traced"
    graph.replace_uses(name, f"{name}/traced")


def _declare_inputs_and_outputs(graph: Graph, decoder: Decoder) -> None:
    """Declares shapes with a name for each dynamic size, the same for past and present."""
    inputs, outputs = graph.model.graph.input, graph.model.graph.output
    cache = ["batch_size", decoder.num_kv_heads, "max_sequence_length", decoder.head_size]
    tokens = helper.make_tensor_value_info(
        "input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]
    )
    mask = helper.make_tensor_value_info(
        "attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]
    )
    logits = helper.make_tensor_value_info(
        "logits", TensorProto.FLOAT, ["batch_size", "sequence_length", decoder.vocab_size]
    )
    parts = [f"{i}.{part}" for i in range(decoder.num_layers) for part in ("key", "value")]

    def tensors(prefix: str) -> list[Any]:
        return [
            helper.make_tensor_value_info(f"{prefix}.{part}", TensorProto.FLOAT, cache)
            for part in parts
        ]

    del inputs[:], outputs[:]
    inputs.extend([tokens, mask, *tensors("past_key_values")])
    outputs.extend([logits, *tensors("present")])
