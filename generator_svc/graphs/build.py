"""Builds the graphs of this folder: `python -m generator_svc.graphs.build` writes the files.

Needs onnx, an export dependency, so no serving code imports this module.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from generator_svc.graphs import ARGMAX, BYTE_PRODUCT, DECODE_INPUTS, DEVICE_TOPK
from generator_svc.sampling.device_row import BLOCK, CANDIDATES

Constants = dict[str, npt.NDArray[Any]]

_node, _tensor = helper.make_node, helper.make_tensor_value_info
_LOGITS = _tensor("logits", TensorProto.FLOAT, ["rows", "vocabulary_size"])


def device_topk() -> bytes:
    """From logits, float32 [batch, vocabulary], to `values`, `ids` and `rest`; see DeviceRow.

    Reads the rows with indices `places`, int64 [rows], at `inverse_temperatures`, float32
    [rows, 1]. The vocabulary has at least 256 tokens. The last block is padded with zeros.
    """
    constants: Constants = {
        "count": np.array([CANDIDATES], np.int64),
        "first": np.array([0], np.int64),
        "last": np.array([CANDIDATES - 1], np.int64),
        "zero": np.array(0, np.float32),
        "axis": np.array([1], np.int64),
        "block": np.array([BLOCK], np.int64),
        "no_padding": np.array([0, 0, 0], np.int64),
        "blocks": np.array([0, -1, BLOCK], np.int64),
        "inside": np.array([2], np.int64),
    }
    nodes = [
        _node("Gather", ["logits", "places"], ["chosen"], axis=0),
        _node("TopK", ["chosen", "count"], ["values", "ids"], axis=-1, largest=1, sorted=1),
        _node("Gather", ["values", "first"], ["best"], axis=1),
        _node("Gather", ["values", "last"], ["least"], axis=1),
        _node("Greater", ["chosen", "least"], ["is_candidate"]),
        _node("Sub", ["chosen", "best"], ["distance"]),
        _node("Mul", ["distance", "inverse_temperatures"], ["exponent"]),
        _node("Exp", ["exponent"], ["mass"]),
        _node("Where", ["is_candidate", "zero", "mass"], ["remaining"]),
        # Pads to whole blocks with (-vocabulary) modulo 256 zeros.
        _node("Shape", ["logits"], ["vocabulary"], start=1, end=2),
        _node("Neg", ["vocabulary"], ["negative"]),
        _node("Mod", ["negative", "block"], ["missing"]),
        _node("Concat", ["no_padding", "missing"], ["padding"], axis=0),
        _node("Pad", ["remaining", "padding"], ["padded"]),
        _node("Reshape", ["padded", "blocks"], ["by_block"]),
        _node("ReduceSum", ["by_block", "inside"], ["rest"], keepdims=0),
    ]
    outputs = [
        _tensor("values", TensorProto.FLOAT, ["rows", CANDIDATES]),
        _tensor("ids", TensorProto.INT64, ["rows", CANDIDATES]),
        _tensor("rest", TensorProto.FLOAT, ["rows", "block_count"]),
    ]
    inputs = [
        _tensor("logits", TensorProto.FLOAT, ["batch", "vocabulary_size"]),
        _tensor("places", TensorProto.INT64, ["rows"]),
        _tensor("inverse_temperatures", TensorProto.FLOAT, ["rows", 1]),
    ]
    return _serialized("candidates", nodes, inputs, outputs, constants)


def argmax() -> bytes:
    """From logits, float32 [rows, vocabulary], to `ids`, `largest` and `equals`; see GreedyRow.

    `equals` counts the logits that are not less than the largest, NaN included. ReduceMax would be
    simpler, but takes 6 to 12 ms on CUDA, ArgMax 0.05 ms.
    """
    nodes = [
        _node("ArgMax", ["logits"], ["places"], axis=1, keepdims=1),
        _node("GatherElements", ["logits", "places"], ["column"], axis=1),
        _node("Less", ["logits", "column"], ["is_less"]),
        _node("Not", ["is_less"], ["counts"]),
        _node("Cast", ["counts"], ["ones"], to=TensorProto.FLOAT),
        _node("ReduceSum", ["ones", "axis"], ["equals"], keepdims=0),
        _node("Squeeze", ["column", "axis"], ["largest"]),
        _node("Squeeze", ["places", "axis"], ["ids"]),
    ]
    outputs = [
        _tensor("ids", TensorProto.INT64, ["rows"]),
        _tensor("largest", TensorProto.FLOAT, ["rows"]),
        _tensor("equals", TensorProto.FLOAT, ["rows"]),
    ]
    return _serialized("argmax", nodes, [_LOGITS], outputs, {"axis": np.array([1], np.int64)})


def decode_inputs() -> bytes:
    """From `tokens` and `positions`, int64 [rows, 1], and `length`, int64, to decode inputs.

    These are `input_ids`, int64 [rows, 1], and `attention_mask`, int64 [rows, length], with ones
    up to and including each row's position.
    """
    constants: Constants = {"zero": np.array(0, np.int64), "one": np.array(1, np.int64)}
    nodes = [
        _node("Identity", ["tokens"], ["input_ids"]),
        _node("Range", ["zero", "length", "one"], ["places"]),
        _node("LessOrEqual", ["places", "positions"], ["is_filled"]),
        _node("Cast", ["is_filled"], ["attention_mask"], to=TensorProto.INT64),
    ]
    inputs = [
        _tensor("tokens", TensorProto.INT64, ["rows", 1]),
        _tensor("positions", TensorProto.INT64, ["rows", 1]),
        _tensor("length", TensorProto.INT64, []),
    ]
    outputs = [
        _tensor("input_ids", TensorProto.INT64, ["rows", 1]),
        _tensor("attention_mask", TensorProto.INT64, ["rows", "slot_length"]),
    ]
    return _serialized("fixed_inputs", nodes, inputs, outputs, constants)


def byte_product() -> bytes:
    """`y`, int32 [1, 1], is `a`, uint8 [1, 8], times a column of eight int8 weights of 127."""
    return _serialized(
        "byte_product",
        [_node("MatMulInteger", ["a", "b"], ["y"])],
        [_tensor("a", TensorProto.UINT8, [1, 8])],
        [_tensor("y", TensorProto.INT32, [1, 1])],
        {"b": np.full((8, 1), 127, np.int8)},
    )


BUILDERS: dict[Path, Callable[[], bytes]] = {
    DEVICE_TOPK: device_topk,
    ARGMAX: argmax,
    DECODE_INPUTS: decode_inputs,
    BYTE_PRODUCT: byte_product,
}


def _serialized(
    name: str, nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: Constants
) -> bytes:
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, name, inputs, outputs, initializers)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


if __name__ == "__main__":
    for path, build in BUILDERS.items():
        path.write_bytes(build())
