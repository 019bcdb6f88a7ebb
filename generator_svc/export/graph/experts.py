"""Replaces every traced mixture of experts by one com.microsoft.MoE or QMoE.

The router's product stays as traced; the operator takes its logits and does the rest. The rows of
the first matrices alternate between gate and up (`swiglu_fusion` 1), as in gpt-oss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
from onnx import TensorProto

from generator_svc.export.checkpoint import mxfp4
from generator_svc.export.checkpoint.decoder import Experts
from generator_svc.export.checkpoint.experts import ExpertMatrices
from generator_svc.export.errors import ExportError
from generator_svc.export.graph.attention import module_output
from generator_svc.export.graph.graph import MICROSOFT, Graph
from generator_svc.export.options import ExportOptions
from generator_svc.export.weights import int4, int8
from generator_svc.export.weights.blocks import BLOCK_SIZE
from generator_svc.export.weights.matrix import Array
from generator_svc.export.weights.packing import Packed, Packing

Form = Literal["float", "int8", "int4", "fp4"]

# Inputs 8 to 14 of QMoE: a third matrix, zero points, router weights.
_UNUSED_INPUTS = [""] * 7

# Scales of the int8 form are half of those of MXFP4.
_FLOAT16_HALVES = range(mxfp4.FLOAT16_EXPONENTS.start + 1, mxfp4.FLOAT16_EXPONENTS.stop + 1)


def choose_form(options: ExportOptions, is_mxfp4: bool) -> Form:
    """The form of the experts; the precision in `options` applies to everything else.

    MXFP4 is kept as it is on CUDA; on the CPU its values are stored in 8 bits, unless the precision
    is fp32 or int4.
    """
    if options.device == "cuda" and is_mxfp4:
        return "fp4"
    if options.precision in ("fp32", "fp16"):
        return "float"
    return "int4" if options.precision == "int4" else "int8"


def swap_experts(graph: Graph, experts: Experts, form: Form, is_half: bool) -> None:
    """Rewrites all layers; `is_half`: scales will be float16."""
    for number, (gate_up, down) in enumerate(experts.layers):
        module = f"/model/layers.{number}/mlp/"
        router = [graph.node(f"{module}router/{op}") for op in ("Reshape", "Gemm")]
        reshape, product = router
        if reshape is None or product is None:
            raise ExportError(f"the traced graph has no {module}router: unsupported experts")
        result = module_output(graph, module)
        kept = {reshape.name, product.name}
        shape = graph.producer(reshape.input[1])
        if shape is not None:
            kept.add(shape.name)
        graph.remove(node for node in graph.under(module) if node.name not in kept)
        inputs = [reshape.input[0], product.output[0]]
        for matrices in (gate_up, down):
            inputs += graph.stream(_pack(matrices, form, is_half))
            inputs.append(graph.constant(f"{matrices.name}_bias", matrices.bias()))
        if form == "fp4":
            ones = graph.constant("/experts/global_scale", np.ones(gate_up.count, np.float32))
            inputs += [*_UNUSED_INPUTS, ones, ones]
        op = "MoE" if form == "float" else "QMoE"
        attributes = _attributes(experts, form)
        graph.add(op, f"{module}{op}", inputs, [result], domain=MICROSOFT, **attributes)
    graph.finish()


def _attributes(experts: Experts, form: Form) -> dict[str, Any]:
    """All attributes that matter, since the defaults are meant for other models."""
    attributes: dict[str, Any] = {
        "k": experts.chosen,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": experts.alpha,
        "activation_beta": 1.0,
        "swiglu_limit": experts.limit,
        "normalize_routing_weights": 1,
    }
    if form == "float":
        return attributes
    attributes["block_size"] = BLOCK_SIZE
    attributes["expert_weight_bits"] = 8 if form == "int8" else 4
    attributes["quant_type"] = "fp4" if form == "fp4" else "int"
    if form != "fp4":
        attributes["weights_prepacked"] = 0  # repacked into CUDA's own layout when they are loaded
    return attributes


def _pack(matrices: ExpertMatrices, form: Form, is_half: bool) -> Packing:
    """The weights of all experts and, unless they are floats, a scale per block."""
    rows, columns = matrices.rows, matrices.columns
    if form != "float" and columns % BLOCK_SIZE:
        raise ExportError(f"{matrices.name}: {columns} columns are not a multiple of {BLOCK_SIZE}")

    def packed(suffix: str, shape: tuple[int, int], data_type: int) -> Packed:
        return Packed(matrices.name + suffix, (matrices.count, *shape), data_type)

    scales = packed("_scales", (rows, columns // BLOCK_SIZE), TensorProto.FLOAT)
    outputs: tuple[Packed, ...]
    make: Callable[[int], tuple[Array, ...]]
    if form == "float":
        outputs = (packed("", (rows, columns), TensorProto.FLOAT),)
        make = partial(_as_floats, matrices)
    elif form == "int8":
        outputs = (packed("_Q8", (rows, columns), TensorProto.UINT8), scales)
        allowed = _FLOAT16_HALVES if is_half else mxfp4.FLOAT32_EXPONENTS
        make = partial(_as_int8, matrices, allowed, is_half)
    elif form == "int4":
        outputs = (packed("_Q4", (rows, columns // 2), TensorProto.UINT8), scales)
        make = partial(_as_int4, matrices, is_half)
    else:
        codes = packed("_FP4", (columns, rows // 2), TensorProto.UINT8)
        outputs = (codes, replace(scales, data_type=TensorProto.FLOAT8E8M0))
        make = partial(_as_fp4, matrices)
    return Packing(outputs, [partial(make, expert) for expert in range(matrices.count)])


# Each of these makes the slices of one expert, [1, ...].


def _as_floats(matrices: ExpertMatrices, expert: int) -> tuple[Array, ...]:
    return (matrices.floats(expert)[None],)


def _as_int8(
    matrices: ExpertMatrices, allowed: range, is_half: bool, expert: int
) -> tuple[Array, ...]:
    if matrices.is_mxfp4:
        levels, scales = mxfp4.as_int8(*matrices.mxfp4(expert, allowed))
    else:
        levels, scales = int8.quantize_symmetric(matrices.floats(expert), is_half)
    return levels.reshape(1, matrices.rows, -1), scales[None]


def _as_int4(matrices: ExpertMatrices, is_half: bool, expert: int) -> tuple[Array, ...]:
    levels, scales = int4.quantize_symmetric(matrices.floats(expert), is_half)
    return levels.reshape(1, matrices.rows, -1), scales[None]


def _as_fp4(matrices: ExpertMatrices, expert: int) -> tuple[Array, ...]:
    # The kernel converts the scales to float16 when it loads them.
    blocks, scales = matrices.mxfp4(expert, mxfp4.FLOAT16_EXPONENTS)
    return mxfp4.as_fp4(blocks)[None], scales[None]
