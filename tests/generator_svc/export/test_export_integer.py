"""Precision w8a8: integer products with scales that do not depend on other requests."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from generator_svc import device
from generator_svc.device import DeviceError
from generator_svc.export import ExportError, ExportOptions, embedded_precision
from generator_svc.export.calibration.activations import calibrate
from generator_svc.export.calibration.smooth import smooth
from generator_svc.export.checkpoint.checkpoint import load_checkpoint
from generator_svc.export.checkpoint.source import locate
from generator_svc.run.runner import OrtRunner
from tests.tiny_models import tiny_checkpoint, tiny_model_directory
from trivium.model_directory import load_model_directory

FAMILIES = ("llama", "llama-untied", "qwen2", "qwen3", "mistral")
TOKENS = [int(token) for token in np.random.default_rng(3).integers(3, 400, 300)]


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_changes_nothing_but_rounding(family):
    """The model's logits stay the same, also with biases and shared value heads."""
    model = load_checkpoint(locate(str(tiny_checkpoint(family)))).model
    tokens = torch.tensor([TOKENS[:64]])
    with torch.inference_mode():
        before = model(tokens).logits

    smooth(model, calibrate(model, TOKENS))

    with torch.inference_mode():
        after = model(tokens).logits
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


def test_ranges_after_smoothing_are_those_of_the_smoothed_model():
    """The ranges of activations are updated together with them."""
    model = load_checkpoint(locate(str(tiny_checkpoint("qwen2")))).model
    ranges = calibrate(model, TOKENS)
    smooth(model, ranges)

    for key, largest in calibrate(model, TOKENS).items():
        assert torch.allclose(largest, ranges[key], rtol=1e-2, atol=1e-3)


def test_smoothing_reduces_outlier_channels():
    """An input's largest channel stands out less, as is needed for 8 bits."""
    model = load_checkpoint(locate(str(tiny_checkpoint("llama")))).model
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = 40.0
    ranges = calibrate(model, TOKENS)
    spread = {key: float(r.max() / r.median()) for key, r in ranges.items()}
    smooth(model, ranges)

    key = (0, "self_attn.q_proj")
    assert float(ranges[key].max() / ranges[key].median()) < spread[key] / 3


@pytest.mark.parametrize("family", FAMILIES)
def test_it_stays_close_to_the_checkpoint(family):
    """The loss of quality is in the manifest, and small."""
    model = load_model_directory(tiny_model_directory(family, "w8a8"))

    assert "w8a8" == model.precision
    assert model.manifest["agreement"]["top1_agreement"] >= 0.75
    assert model.manifest["agreement"]["mean_kl_divergence"] < 0.2


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_matmuls_use_integers(family):
    """All but the MLP's down projection, which has a scale per row and block, and the head."""
    graph = onnx.load(load_model_directory(tiny_model_directory(family, "w8a8")).graph).graph
    kinds = {node.name: node.op_type for node in graph.node}
    qkv = "qkv_proj" if family == "llama" else "q_proj"

    assert "MatMulIntegerToFloat" == kinds[f"/model/layers.0/self_attn/{qkv}/MatMul"]
    assert "MatMulIntegerToFloat" == kinds["/model/layers.2/self_attn/o_proj/MatMul"]
    assert "MatMulIntegerToFloat" == kinds["/model/layers.1/mlp/gate_up_proj/MatMul"]
    assert "MatMulNBits" == kinds["/model/layers.1/mlp/down_proj/MatMul"]
    assert "MatMulNBits" == kinds["/lm_head/MatMul"]
    assert "MatMul" not in kinds.values()


def test_cpu_with_saturating_int8_is_refused(monkeypatch):
    """Nothing is exported or loaded that would not give the numbers that were measured."""
    folder = tiny_model_directory("llama", "w8a8")
    monkeypatch.setattr(device, "multiplies_bytes_exactly", lambda: False)
    monkeypatch.setattr("generator_svc.run.runner.multiplies_bytes_exactly", lambda: False)

    assert "int8" == embedded_precision()
    with pytest.raises(ExportError, match="use int8"):
        ExportOptions("w8a8")
    with pytest.raises(DeviceError, match="precision int8"):
        OrtRunner(load_model_directory(folder), "cpu", 1, 64)


def test_devices_other_than_the_cpu_are_refused():
    """Other devices are refused before any work is done, and at loading before they are used."""
    with pytest.raises(ExportError, match="for cpu"):
        ExportOptions("w8a8", "cuda")
    with pytest.raises(DeviceError, match="CPU only"):
        OrtRunner(load_model_directory(tiny_model_directory("llama", "w8a8")), "cuda", 1, 64)


def test_logits_are_bitwise_equal_in_any_batch(slots):
    """Chunking, the rest of the batch and the row do not change a bit."""
    cache = slots(load_model_directory(tiny_model_directory("llama", "w8a8")), rows=4)
    prompts = [TOKENS[:40], TOKENS[50:90], TOKENS[100:140]]
    whole = [cache.prefill(row, prompt).tolist() for row, prompt in enumerate(prompts)]
    alone = [cache.run(row, [[9]], [41])[0].tolist() for row in range(3)]

    assert whole == [cache.prefill(row, p, chunk=20).tolist() for row, p in enumerate(prompts)]
    assert alone == cache.run(0, [[9]] * 3, [41] * 3).tolist()
