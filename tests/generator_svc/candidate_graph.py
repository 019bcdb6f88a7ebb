"""The graphs that pick the largest logit, and candidates, on the device; the latter in numpy too.

`python tests/generator_svc/candidate_graph.py` writes the files that the generator ships.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from generator_svc.device_row import ARGMAX_GRAPH, BLOCK, CANDIDATES, GRAPH, DeviceRow


def candidate_graph():
    """Bytes of the model: logits, float32 [rows, vocabulary], to `values`, `ids` and `rest`.

    The vocabulary has at least 256 tokens. The last block of `rest` is padded with zeros.
    """
    constants = {
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
    node = helper.make_node
    nodes = [
        node("TopK", ["logits", "count"], ["values", "ids"], axis=-1, largest=1, sorted=1),
        node("Gather", ["values", "first"], ["best"], axis=1),
        node("Gather", ["values", "last"], ["least"], axis=1),
        node("Greater", ["logits", "least"], ["is_candidate"]),
        node("Sub", ["logits", "best"], ["distance"]),
        node("Exp", ["distance"], ["mass"]),
        node("Where", ["is_candidate", "zero", "mass"], ["remaining"]),
        # Zeros up to a whole block: (-vocabulary) modulo 256 of them.
        node("Shape", ["logits"], ["vocabulary"], start=1, end=2),
        node("Neg", ["vocabulary"], ["negative"]),
        node("Mod", ["negative", "block"], ["missing"]),
        node("Concat", ["no_padding", "missing"], ["padding"], axis=0),
        node("Pad", ["remaining", "padding"], ["padded"]),
        node("Reshape", ["padded", "blocks"], ["by_block"]),
        node("ReduceSum", ["by_block", "inside"], ["rest"], keepdims=0),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "candidates",
        [value("logits", TensorProto.FLOAT, ["rows", "vocabulary_size"])],
        [
            value("values", TensorProto.FLOAT, ["rows", CANDIDATES]),
            value("ids", TensorProto.INT64, ["rows", CANDIDATES]),
            value("rest", TensorProto.FLOAT, ["rows", "block_count"]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return _serialized(graph)


def argmax_graph():
    """Bytes of the model: logits, float32 [rows, vocabulary], to `ids`, `largest` and `equals`.

    `equals` counts the logits that are not less than the largest, as no number is. ReduceMax would
    say it more simply and takes 6 to 12 ms on CUDA, ArgMax 0.05.
    """
    node = helper.make_node
    nodes = [
        node("ArgMax", ["logits"], ["places"], axis=1, keepdims=1),
        node("GatherElements", ["logits", "places"], ["column"], axis=1),
        node("Less", ["logits", "column"], ["is_less"]),
        node("Not", ["is_less"], ["counts"]),
        node("Cast", ["counts"], ["ones"], to=TensorProto.FLOAT),
        node("ReduceSum", ["ones", "axis"], ["equals"], keepdims=0),
        node("Squeeze", ["column", "axis"], ["largest"]),
        node("Squeeze", ["places", "axis"], ["ids"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "argmax",
        [value("logits", TensorProto.FLOAT, ["rows", "vocabulary_size"])],
        [
            value("ids", TensorProto.INT64, ["rows"]),
            value("largest", TensorProto.FLOAT, ["rows"]),
            value("equals", TensorProto.FLOAT, ["rows"]),
        ],
        [numpy_helper.from_array(np.array([1], np.int64), "axis")],
    )
    return _serialized(graph)


def _serialized(graph):
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def device_row(row):
    """What the graph gives for one row, float32 [vocabulary], by numpy."""
    size = row.size
    ids = np.lexsort((np.arange(size), -row))[:CANDIDATES]
    values = row[ids]
    with np.errstate(invalid="ignore"):
        mass = np.exp((row - values[0]).astype(np.float64))
        rest = np.zeros(-(-size // BLOCK) * BLOCK)
        rest[:size] = np.where(row > values[-1], 0, mass)
    sums = rest.reshape(-1, BLOCK).sum(axis=1).astype(np.float32)
    return DeviceRow(size, ids, values, sums, lambda: row)


if __name__ == "__main__":
    GRAPH.write_bytes(candidate_graph())
    ARGMAX_GRAPH.write_bytes(argmax_graph())
