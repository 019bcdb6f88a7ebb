"""The graph that writes the inputs of decode runs on the device.

`python tests/generator_svc/fixed_inputs_graph.py` writes the file that the generator ships.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from generator_svc.fixed_inputs import GRAPH


def fixed_inputs_graph():
    """Bytes of the model: `tokens` and `positions`, int64 [rows, 1], and `length`, int64, to
    `input_ids`, int64 [rows, 1], and `attention_mask`, int64 [rows, length], which has ones from
    the left up to each row's position."""
    constants = {"zero": np.array(0, np.int64), "one": np.array(1, np.int64)}
    node, value = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Identity", ["tokens"], ["input_ids"]),
        node("Range", ["zero", "length", "one"], ["places"]),
        node("LessOrEqual", ["places", "positions"], ["is_filled"]),
        node("Cast", ["is_filled"], ["attention_mask"], to=TensorProto.INT64),
    ]
    graph = helper.make_graph(
        nodes,
        "fixed_inputs",
        [
            value("tokens", TensorProto.INT64, ["rows", 1]),
            value("positions", TensorProto.INT64, ["rows", 1]),
            value("length", TensorProto.INT64, []),
        ],
        [
            value("input_ids", TensorProto.INT64, ["rows", 1]),
            value("attention_mask", TensorProto.INT64, ["rows", "slot_length"]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


if __name__ == "__main__":
    GRAPH.write_bytes(fixed_inputs_graph())
