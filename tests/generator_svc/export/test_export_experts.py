"""gpt-oss exports compared with transformers and float experts: their logits, and their bits.

Int8 experts are run with exact products here (`ORT_QMOE_CPU_QNBIT_GEMM`): by default ONNX Runtime's
CPU kernel rounds their inputs to eight bits too, which may change which experts are chosen.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from safetensors.torch import load_file, save_file

from generator_svc.export import ExportError, ExportOptions, export_model
from generator_svc.export.checkpoint.checkpoint import load_checkpoint
from generator_svc.export.checkpoint.residual import scale_residual
from generator_svc.export.checkpoint.source import locate
from generator_svc.export.graph.external_data import save
from generator_svc.export.graph.trace import trace
from generator_svc.export.pipeline import rewrite
from generator_svc.export.verify import GraphRunner
from generator_svc.export.verify_experts import EXACT_PRODUCTS, check_packed
from generator_svc.export.weights import int4
from tests.tiny_gpt_oss import END_TOKENS, in_transformers
from tests.tiny_models import tiny_checkpoint, tiny_model_directory
from trivium.model_directory import ModelDirectory, load_model_directory

TOLERANCE = 1e-4
PARTS = ("gate_up_proj", "down_proj")


@cache
def reference_model():
    return in_transformers(tiny_checkpoint("gpt-oss"))


def logits_of(model, tokens):
    """[positions, vocabulary]."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].numpy()


FULL, HALF = ExportOptions("fp32"), ExportOptions("fp16", "cuda")


def exported(folder: Path, source: Path, form: str, options=FULL) -> Path:
    """Exports a graph with experts in this form, and everything else according to `options`."""
    checkpoint = load_checkpoint(locate(str(source)))
    if options.is_half:
        checkpoint = scale_residual(checkpoint)
    graph = trace(checkpoint, folder / "traced")
    rewrite(graph, checkpoint, options, experts_form=form)
    save(graph, folder / "model.onnx", folder / "model.onnx.data")
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def model_with(tmp_path_factory):
    """Makes a model directory with experts in the given form and everything else in float32."""

    @cache
    def make(form: str) -> ModelDirectory:
        graph = exported(tmp_path_factory.mktemp(form), tiny_checkpoint("gpt-oss"), form)
        return replace(load_model_directory(tiny_model_directory("gpt-oss")), graph=graph)

    return make


@pytest.fixture
def exact_products(monkeypatch):
    monkeypatch.setenv(EXACT_PRODUCTS, "fp32")


def in_four_bits(model):
    """The same model with its experts rounded to four bits."""
    with torch.no_grad():
        for layer in model.model.layers:
            for name in PARTS:
                weight = getattr(layer.mlp.experts, name)
                for expert in range(len(weight)):
                    packed, scales = int4.quantize_symmetric(weight[expert].T.contiguous().numpy())
                    levels = np.stack([packed & 15, packed >> 4], -1).reshape(*scales.shape, 32)
                    values = (levels.astype(np.float32) - 8) * scales[..., None]
                    weight[expert] = torch.from_numpy(values.reshape(len(values), -1).T.copy())
    return model


@cache
def model_behind(form: str):
    return (
        in_four_bits(in_transformers(tiny_checkpoint("gpt-oss")))
        if form == "int4"
        else (reference_model())
    )


def test_experts_from_the_files_equal_transformers(prompt):
    """Read one at a time, in MXFP4 or in bfloat16, they give the same logits."""
    tokens = prompt(60)
    expected = logits_of(reference_model(), tokens)

    for family in ("gpt-oss", "gpt-oss-bf16"):
        checkpoint = load_checkpoint(locate(str(tiny_checkpoint(family))))
        np.testing.assert_allclose(logits_of(checkpoint.model, tokens), expected, atol=2e-5)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("form", ["float", "int8", "int4"])
def test_prompts_and_chunks_equal_transformers(form, model_with, slots, prompt):
    """Whole, token by token and in chunks, for a prompt several windows long."""
    tokens = prompt(90)
    expected = logits_of(model_behind(form), tokens)[-1]

    for chunk in (None, 1, 33):
        logits = slots(model_with(form)).prefill(0, tokens, chunk)
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("form", ["float", "int8", "int4"])
def test_ragged_rows_equal_transformers(form, model_with, slots, prompt):
    """Rows shorter and longer than the window decode together, each with its own experts."""
    lengths = [1, 5, 40, 77]
    prompts = [prompt(length, seed=length) for length in lengths]
    running = slots(model_with(form), rows=len(lengths))
    for row, tokens in enumerate(prompts):
        running.prefill(row, tokens)

    logits = running.run(0, [[9]] * 4, [length + 1 for length in lengths])

    expected = np.stack([logits_of(model_behind(form), [*tokens, 9])[-1] for tokens in prompts])
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)


def without_sinks(graph):
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input[11] = ""


def swapped_gate_and_up(graph):
    for tensor in graph.initializer:
        if tensor.name.endswith("gate_up_proj"):
            rows = numpy_helper.to_array(tensor).reshape(8, -1, 2, 64)[:, :, ::-1]
            swapped = np.ascontiguousarray(rows).reshape(tensor.dims)
            tensor.CopyFrom(numpy_helper.from_array(swapped, tensor.name))


def changed(name: str, value: float | int | None):
    """Changes an attribute to another value, or to its default."""

    def change(graph):
        nodes = [n for n in graph.node if any(a.name == name for a in n.attribute)]
        assert nodes
        for node in nodes:
            kept = [a for a in node.attribute if a.name != name]
            del node.attribute[:]
            node.attribute.extend(kept)
            if value is not None:
                node.attribute.append(onnx.helper.make_attribute(name, value))

    return change


@pytest.mark.parametrize(
    "change",
    [
        without_sinks,
        swapped_gate_and_up,
        changed("local_window_size", 23),
        changed("local_window_size", None),
        changed("swiglu_limit", None),
        changed("activation_alpha", None),
        changed("activation_beta", None),
        changed("normalize_routing_weights", None),
        changed("k", 3),
    ],
)
def test_each_architecture_feature_affects_the_logits(change, model_with, slots, prompt, tmp_path):
    """Logits of a graph that lacks one of them are far off, so the tests above would notice."""
    model = onnx.load(model_with("float").graph)
    change(model.graph)
    onnx.save(model, tmp_path / "model.onnx")
    tokens = prompt(90)

    logits = slots(replace(model_with("float"), graph=tmp_path / "model.onnx")).prefill(0, tokens)

    error = np.abs(logits - logits_of(reference_model(), tokens)[-1]).max()
    assert error > 100 * TOLERANCE


# ---- the bits of the model directories


@pytest.fixture(scope="module")
def for_cuda(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folders") / "cuda"
    return export_model(str(tiny_checkpoint("gpt-oss")), folder, HALF)


def initializers(folder: Path):
    """The graph's nodes, and the values of its initializers as they are in the files."""
    graph = onnx.load(folder / "model.onnx").graph
    return graph.node, {tensor.name: tensor for tensor in graph.initializer}


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def test_cuda_weights_equal_the_checkpoints(for_cuda):
    """Decoded codes and scales equal the weights; for down_proj, 1/64 of them."""
    nodes, tensors = initializers(for_cuda)
    experts = [node for node in nodes if node.op_type == "QMoE"]

    assert 4 == len(experts)
    for layer, node in enumerate(experts):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (b"fp4", 4, 32) == tuple(
            attributes[name] for name in ("quant_type", "expert_weight_bits", "block_size")
        )
        for part, at, factor in ((PARTS[0], 2, 1.0), (PARTS[1], 5, 1 / 64)):
            codes = numpy_helper.to_array(tensors[node.input[at]])
            scales = tensors[node.input[at + 1]]
            assert TensorProto.FLOAT8E8M0 == scales.data_type
            exponents = np.frombuffer(scales.raw_data, np.uint8).reshape(scales.dims)
            pairs = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1)
            signed = np.where(pairs & 8, -1, 1) * E2M1[pairs & 7]
            powers = np.repeat(2.0 ** (exponents.astype(np.float32) - 127), 32, -1)
            weight = getattr(reference_model().model.layers[layer].mlp.experts, part)
            np.testing.assert_array_equal(
                signed * powers.transpose(0, 2, 1), weight.detach().numpy() * factor
            )
        for name in node.input[15:17]:
            assert TensorProto.FLOAT == tensors[name].data_type
            assert np.all(1 == numpy_helper.to_array(tensors[name]))


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_portable_models_have_no_device_specific_layout(form, model_with):
    """The CUDA provider arranges raw weights itself when it loads them."""
    nodes = onnx.load(model_with(form).graph).graph.node
    experts = [node for node in nodes if node.op_type == "QMoE"]

    for node in experts:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert 0 == attributes["weights_prepacked"]
    assert 4 == len(experts)


def test_the_manifest_says_what_was_compared(for_cuda):
    """The CPU cannot run these experts: only the first layers are compared, and some bits."""
    agreement = json.loads((for_cuda / "trivium_export.json").read_text())["agreement"]

    assert agreement["top1_agreement"] == 1.0
    assert agreement["max_logit_difference"] < 0.1
    left_out = " ".join(agreement["not_compared"])
    assert "layers 2 to 3" in left_out
    assert "layers 0, 2, 3" in left_out


def test_wrong_packed_experts_are_detected(for_cuda, tmp_path):
    """If one bit is wrong, the expert is named."""
    folder = tmp_path / "copy"
    shutil.copytree(for_cuda, folder)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    name = "model.layers.2.mlp.experts.down_proj_FP4"
    tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    expert_size = int(place["length"]) // 8
    with (folder / "model.onnx.data").open("r+b") as file:
        at = int(place["offset"]) + 5 * expert_size + 7
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))
    checkpoint = scale_residual(load_checkpoint(locate(str(tiny_checkpoint("gpt-oss")))))

    check_packed(for_cuda / "model.onnx", checkpoint.decoder.experts)
    with pytest.raises(ExportError, match=r"expert 5 of model\.layers\.2\.mlp\.experts\.down_proj"):
        check_packed(folder / "model.onnx", checkpoint.decoder.experts)


def test_the_folder_is_a_gpt_oss(for_cuda):
    """It has onnxruntime-genai's family name and the EOS tokens of generation_config.json."""
    config = json.loads((for_cuda / "genai_config.json").read_text())["model"]
    tokenizer = json.loads((for_cuda / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}

    assert "gptoss" == config["type"]
    assert [ids[token] for token in END_TOKENS] == config["eos_token_id"]


# ---- float16


def edited(folder: Path, edit) -> Path:
    """A copy of the checkpoint whose tensors `edit` has changed."""
    shutil.copytree(tiny_checkpoint("gpt-oss"), folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def much_larger(tensors):
    for name, tensor in tensors.items():
        if name.endswith("down_proj_scales"):
            tensor += 13
        elif name.endswith("down_proj_bias"):
            tensor *= 2**13


def test_scaling_the_residual_changes_nothing(prompt):
    """Scaling by a power of two rounds nothing, so the logits are bitwise the same."""
    tokens = prompt(60)
    source = locate(str(tiny_checkpoint("gpt-oss")))
    scaled = scale_residual(load_checkpoint(source))

    expected = logits_of(load_checkpoint(source).model, tokens)
    np.testing.assert_array_equal(expected, logits_of(scaled.model, tokens))


@pytest.mark.usefixtures("exact_products")
def test_large_activations_fit_float16(tmp_path, prompt, monkeypatch):
    """A residual stream beyond 65,504 is computed correctly, but not if it is not scaled."""
    source = edited(tmp_path / "large", much_larger)
    tokens = prompt(40)
    expected = logits_of(in_transformers(source), tokens)
    decoder = load_checkpoint(locate(str(source))).decoder

    graph = exported(tmp_path / "scaled", source, "int8", HALF)
    logits = GraphRunner(graph, decoder).run(tokens)
    monkeypatch.setattr(f"{__name__}.scale_residual", lambda checkpoint: checkpoint)
    graph = exported(tmp_path / "unscaled", source, "int8", HALF)
    unscaled = GraphRunner(graph, decoder).run(tokens)

    assert np.abs(logits - expected).max() < 0.2
    assert (logits.argmax(-1) == expected.argmax(-1)).mean() > 0.9
    assert not np.isfinite(unscaled).all()


# ---- refusals


@pytest.mark.parametrize(
    ("precision", "device", "message"),
    [("w8a8", "cpu", "w8a8 does not support experts"), ("fp32", "cuda", "fp32 has no CUDA kernel")],
)
def test_unsupported_expert_options_are_refused(precision, device, message, tmp_path, monkeypatch):
    """With one line, before any work is done, and nothing is left behind."""
    monkeypatch.setattr("generator_svc.export.options._multiplies_bytes_exactly", lambda: True)
    options = ExportOptions(precision, device)

    with pytest.raises(ExportError, match=message):
        export_model(str(tiny_checkpoint("gpt-oss")), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def missing_scales(tensors):
    del tensors["model.layers.1.mlp.experts.gate_up_proj_scales"]


def cut_bias(tensors):
    name = "model.layers.1.mlp.experts.down_proj_bias"
    tensors[name] = tensors[name][:, :32].contiguous()


def not_a_number(tensors):
    tensors["model.layers.2.mlp.experts.down_proj_scales"][3, 5, 1] = 255


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (missing_scales, r"layers\.1\.mlp\.experts\.gate_up_proj_scales"),
        (cut_bias, r"layers\.1\.mlp\.experts\.down_proj_bias is \[8, 32\] instead of \[8, 64\]"),
        (not_a_number, r"layers\.2\.mlp\.experts\.down_proj_scales: exponent byte 255"),
    ],
)
def test_incomplete_experts_are_refused(edit, message, tmp_path):
    """The tensor is named."""
    folder = edited(tmp_path / "checkpoint", edit)

    with pytest.raises(ExportError, match=message):
        export_model(str(folder), tmp_path / "out", ExportOptions("int8"))
    assert not (tmp_path / "out").exists()
