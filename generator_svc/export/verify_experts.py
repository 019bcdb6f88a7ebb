"""What can be verified on the CPU of a graph whose experts only CUDA can run.

The packed experts of some layers are compared with the checkpoint bit for bit. Everything else is
compared in a twin: the model's first layers, exported in the same way except that their experts
have the same values in 8 bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch

from generator_svc.export.checkpoint.checkpoint import Checkpoint
from generator_svc.export.checkpoint.decoder import Experts
from generator_svc.export.checkpoint.experts import ExpertMatrices
from generator_svc.export.checkpoint.mxfp4 import FLOAT16_EXPONENTS
from generator_svc.export.errors import ExportError
from generator_svc.export.progress import Progress, silent
from generator_svc.export.verify import Agreement, compare
from generator_svc.export.weights.matrix import Array

EXACT_PRODUCTS = "ORT_QMOE_CPU_QNBIT_GEMM"
TWIN_LAYERS = 2  # one with sliding window attention, one without


def sampled_layers(count: int) -> list[int]:
    """The first, middle and last layer."""
    return sorted({0, count // 2, count - 1})


def check_packed(graph: Path, experts: Experts) -> None:
    """Unpacks every expert of the sampled layers; raises ExportError if one differs."""
    initializers = {
        tensor.name: tensor
        for tensor in onnx.load(graph, load_external_data=False).graph.initializer
    }
    for layer in sampled_layers(len(experts.layers)):
        for matrices in experts.layers[layer]:
            codes, scales = (
                _mapped(graph, initializers[matrices.name + suffix])
                for suffix in ("_FP4", "_scales")
            )
            for expert in range(matrices.count):
                if not _is_packed(matrices, expert, codes[expert], scales[expert]):
                    raise ExportError(
                        f"{graph}: expert {expert} of {matrices.name} differs from the checkpoint"
                    )


def _mapped(graph: Path, tensor: onnx.TensorProto) -> Array:
    place = {entry.key: entry.value for entry in tensor.external_data}
    return np.memmap(
        graph.with_name(place["location"]),
        np.uint8,
        "r",
        int(place["offset"]),
        tuple(tensor.dims),
    )


def _is_packed(matrices: ExpertMatrices, expert: int, codes: Array, scales: Array) -> bool:
    """Whether codes [columns, rows / 2] and scales [rows, blocks] are those of the checkpoint."""
    blocks, expected = matrices.mxfp4(expert, FLOAT16_EXPONENTS)
    ours = _nibbles(codes).T
    theirs = _nibbles(blocks.reshape(matrices.rows, -1))
    return np.array_equal(ours, theirs) and np.array_equal(scales, expected)


def _nibbles(packed: Array) -> Array:
    """Bytes [n, m] as nibbles [n, 2 m], the low one first."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)


def compare_twin(
    checkpoint: Checkpoint,
    export_twin: Callable[[Checkpoint], Path],
    tokens: list[int],
    progress: Progress = silent,
) -> Agreement:
    """Compares a twin of the first layers; `export_twin` exports it.

    Permanently truncates the model of `checkpoint`.
    """
    count = checkpoint.decoder.num_layers
    twin = _first_layers(checkpoint)
    graph = export_twin(twin)
    with _exact_products():
        agreement = compare(twin, graph, tokens, progress)
    named = ", ".join(map(str, sampled_layers(count)))
    missing = [f"layers {TWIN_LAYERS} to {count - 1}"] if count > TWIN_LAYERS else []
    missing += [
        f"the experts' weights, except in layers {named}, which are bit-identical to the "
        "checkpoint's",
        "the experts' kernel, which the CPU lacks: int8 experts with the same values ran instead",
    ]
    return replace(agreement, not_compared=(*agreement.not_compared, *missing))


@contextmanager
def _exact_products() -> Iterator[None]:
    """Sessions created within do not round the input of 8-bit experts to 8 bits.

    ONNX Runtime's CPU kernel does so by default; the CUDA kernel that it stands in for does not.
    """
    before = os.environ.get(EXACT_PRODUCTS)
    os.environ[EXACT_PRODUCTS] = "fp32"
    try:
        yield
    finally:
        del os.environ[EXACT_PRODUCTS]
        if before is not None:
            os.environ[EXACT_PRODUCTS] = before


def _first_layers(checkpoint: Checkpoint) -> Checkpoint:
    decoder, model = checkpoint.decoder, checkpoint.model
    assert decoder.experts is not None
    model.model.layers = torch.nn.ModuleList(model.model.layers[:TWIN_LAYERS])
    model.config.num_hidden_layers = len(model.model.layers)
    model.config.layer_types = model.config.layer_types[:TWIN_LAYERS]
    experts = replace(decoder.experts, layers=decoder.experts.layers[:TWIN_LAYERS])
    decoder = replace(decoder, layers=decoder.layers[:TWIN_LAYERS], experts=experts)
    return replace(checkpoint, decoder=decoder)
