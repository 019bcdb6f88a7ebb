"""The ONNX graph of a checkpoint as traced by Optimum: its structure, without the weights.

Node names contain the module path (`/model/layers.0/self_attn/q_proj/MatMul`), which is all that
the later passes rely on.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from optimum.exporters.onnx import onnx_export_from_model

from generator_svc.export.checkpoint.checkpoint import Checkpoint, quiet_libraries
from generator_svc.export.graph.graph import Graph
from generator_svc.export.graph.skeleton import restore_products

TASK = "text-generation-with-past"


def trace(checkpoint: Checkpoint, folder: Path) -> Graph:
    """Writes Optimum's export into `folder` and returns its graph.

    Inputs: input_ids, attention_mask, position_ids, past_key_values.N.key/value; outputs: logits
    of every position, present.N.key/value. Norms and biases are in the graph; matrices of streamed
    layers are there by name only.
    """
    with quiet_libraries():
        onnx_export_from_model(
            checkpoint.model, folder, task=TASK, no_post_process=True, do_validation=False
        )
    graph = Graph(onnx.load(folder / "model.onnx"))
    restore_products(graph, checkpoint.model)
    return graph
