"""Quantised and half-precision graphs."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from safetensors.numpy import load_file, save_file

from generator_svc.export import ExportError, ExportOptions, export_model
from generator_svc.export.calibration import activations
from tests.tiny_models import tiny_checkpoint, tiny_model_directory
from trivium.model_directory import load_model_directory


def test_int8_logits_stay_close(slots, prompt):
    """Logits with int8 weights stay close to those of the full-precision graph."""
    tokens = prompt(60)
    exact, rounded = (
        slots(load_model_directory(tiny_model_directory("llama", precision))).prefill(0, tokens)
        for precision in ("fp32", "int8")
    )

    assert np.corrcoef(exact, rounded)[0, 1] > 0.995


@pytest.mark.parametrize(("precision", "least"), [("int8", 0.8), ("int4", 0.3)])
def test_agreement_is_in_the_manifest(precision, least):
    """The loss of quality by quantisation is written into the folder."""
    manifest = load_model_directory(tiny_model_directory("llama", precision)).manifest

    assert manifest["agreement"]["top1_agreement"] >= least
    assert manifest["agreement"]["mean_kl_divergence"] < 2
    assert manifest["precision"] == precision


@pytest.mark.parametrize(("family", "precision"), [("llama", "int8"), ("qwen2", "int4")])
def test_a_tied_embedding_reads_the_quantised_head(family, precision):
    """No float copy of the embedding is left, and nodes are named after the modules."""
    graph = onnx.load(load_model_directory(tiny_model_directory(family, precision)).graph).graph
    nodes = {node.name: node for node in graph.node}

    assert nodes["/lm_head/MatMul"].op_type == "MatMulNBits"
    assert nodes["/model/embed_tokens/Gather"].op_type == "GatherBlockQuantized"
    assert nodes["/model/layers.0/mlp/down_proj/MatMul"].op_type == "MatMulNBits"
    floats = [t for t in graph.initializer if t.data_type == TensorProto.FLOAT]
    assert max(np.prod(t.dims) for t in floats) <= 2048 * 8  # the rotary tables


@pytest.mark.parametrize(("precision", "least"), [("fp16", 0.95), ("int8", 0.8), ("int4", 0.3)])
def test_cuda_gets_half_precision_throughout(precision, least, tmp_path):
    """For CUDA, KV cache and activations are float16; only the logits are float32."""
    options = ExportOptions(precision, "cuda")

    folder = export_model(str(tiny_checkpoint("llama")), tmp_path / "m", options)

    agreement = load_model_directory(folder).manifest["agreement"]
    assert agreement["top1_agreement"] >= least
    graph = onnx.load(folder / "model.onnx").graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in [*graph.input, *graph.output]}
    assert kinds["past_key_values.0.key"] == kinds["present.2.value"] == TensorProto.FLOAT16
    assert kinds["logits"] == TensorProto.FLOAT
    assert not [t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT]


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
def test_cuda_gets_symmetric_blocks(precision, bits, tmp_path):
    """As the fastest kernels there need: no zero points, and scales in float16. The manifest says
    so; exports for the CPU have zero points."""
    folder = export_model(
        str(tiny_checkpoint("llama-untied")), tmp_path / "m", ExportOptions(precision, "cuda")
    )
    products = {node.name: node for node in _matmuls(folder)}
    on_cpu = load_model_directory(tiny_model_directory("llama-untied", precision))

    assert load_model_directory(folder).manifest["symmetric_block_size"] == 32
    assert {len(node.input) for node in products.values()} == {3}
    assert {"K", "N", "bits", "block_size", "accuracy_level"} == {
        attribute.name for node in products.values() for attribute in node.attribute
    }
    for name, node in products.items():
        values = {attribute.name: attribute.i for attribute in node.attribute}
        assert values["block_size"] == 32
        assert values["bits"] == (8 if name == "/lm_head/MatMul" else bits)
    assert "symmetric_block_size" not in on_cpu.manifest
    assert {len(node.input) for node in _matmuls(on_cpu.path)} == {3, 4}


def test_int4_for_cuda_is_activation_aware(tmp_path, monkeypatch):
    """Columns with large activations are rounded more carefully than others, in every layer, so the
    output distribution stays closer."""
    checkpoint = tmp_path / "uneven"
    shutil.copytree(tiny_checkpoint("qwen2"), checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    for name, values in tensors.items():
        if name.endswith("layernorm.weight"):
            values[::8] *= 10
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    options = ExportOptions("int4", "cuda")
    found = load_model_directory(export_model(str(checkpoint), tmp_path / "found", options))
    monkeypatch.setattr(activations, "mean_squares", lambda *arguments: {})
    unknown = load_model_directory(export_model(str(checkpoint), tmp_path / "unknown", options))

    divergences = [m.manifest["agreement"]["mean_kl_divergence"] for m in (found, unknown)]
    assert divergences[0] < 0.8 * divergences[1]


def _matmuls(folder):
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return [node for node in graph.node if node.op_type == "MatMulNBits"]


@pytest.mark.parametrize(
    ("precision", "device"), [("int3", "cpu"), ("int8", "tpu"), ("fp16", "cpu")]
)
def test_impossible_options_are_refused(precision, device):
    """A wrong precision or device is named before any work is done."""
    with pytest.raises(ExportError, match=rf"{precision}|{device}"):
        ExportOptions(precision, device)
