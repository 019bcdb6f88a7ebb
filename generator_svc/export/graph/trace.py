"""The untouched ONNX graph of a checkpoint, as Optimum traces it, in float32.

Its node names keep the module path (`/model/layers.0/self_attn/q_proj/MatMul`), which is all that
the later passes rely on.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from optimum.exporters.onnx import onnx_export_from_model

from generator_svc.export.checkpoint.checkpoint import Checkpoint, quiet_libraries

TASK = "text-generation-with-past"


def trace(checkpoint: Checkpoint, folder: Path) -> onnx.ModelProto:
    """Writes Optimum's export into `folder` and returns its graph with all weights in memory.

    Inputs: input_ids, attention_mask, position_ids, past_key_values.N.key/value; outputs: logits
    of every position, present.N.key/value.
    """
    with quiet_libraries():
        onnx_export_from_model(
            checkpoint.model, folder, task=TASK, no_post_process=True, do_validation=False
        )
    return onnx.load(folder / "model.onnx")
