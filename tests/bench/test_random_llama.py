"""Models with random weights: the graph that the exporter would make, and finite logits."""

import dataclasses
from collections import Counter

import numpy as np
import onnx
import pytest

from bench.random_llama import SHAPES, Shape, make_random_llama
from generator_svc.export import ExportOptions, export_model
from generator_svc.plan import Chunk, Row, StepPlan
from generator_svc.run.runner import OrtRunner
from tests.tiny_models import SHAPE, tiny_checkpoint, tiny_model_directory
from tokenizer_svc.tokenizer import Tokenizer
from trivium.model_directory import load_model_directory

PROMPTS = [tuple(range(5, 25)), tuple(range(40, 47)), (9, 8)]


@pytest.fixture(
    scope="module",
    params=[("fp32", "cpu"), ("fp16", "cuda"), ("int8", "cpu"), ("int4", "cpu"), ("int4", "cuda")],
    ids="-".join,
)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "tiny"
    return load_model_directory(make_random_llama(folder, SHAPES["tiny"], *request.param))


@pytest.fixture(scope="module")
def runner(model):
    """On the CPU, which can run the models for CUDA too."""
    return OrtRunner(model, "cpu", 3, 64, threads=1)


def _prefill(runner, slot, token_ids):
    plan = StepPlan(chunks=(Chunk(slot, 0, token_ids, True),))
    return runner.run(plan).chunks[0].logits[0]


def test_batched_decode_gives_each_prompts_logits(runner, model):
    """Decoding a batch gives each prompt's logits: finite, near one, dependent on the cache."""
    for slot, prompt in enumerate(PROMPTS):
        _prefill(runner, slot, prompt)
    rows = runner.run(StepPlan(rows=tuple(Row(3, len(p)) for p in PROMPTS))).rows
    whole = np.stack([_prefill(runner, 0, (*prompt, 3)) for prompt in PROMPTS])

    assert rows.error is None
    assert (3, model.vocab_size) == rows.logits.shape
    assert np.isfinite(rows.logits).all()
    assert 0.5 < rows.logits.std() < 2
    assert np.allclose(whole, rows.logits, atol=0.1)
    assert not np.allclose(whole[0], whole[1], atol=0.5)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_graph_has_the_operators_of_an_export(precision, tmp_path):
    """The same operators, equally often, as in the export of a checkpoint of this shape."""
    exported = tiny_model_directory("llama-untied", precision)
    shape = Shape(
        hidden=SHAPE["hidden_size"],
        layers=SHAPE["num_hidden_layers"],
        heads=SHAPE["num_attention_heads"],
        kv_heads=SHAPE["num_key_value_heads"],
        head_size=SHAPE["hidden_size"] // SHAPE["num_attention_heads"],
        ffn=SHAPE["intermediate_size"],
        vocabulary=load_model_directory(exported).vocab_size,
    )
    made = make_random_llama(tmp_path / "made", shape, precision)

    assert _interface(exported) == _interface(made)
    assert _operators(exported) == _operators(made)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_cuda_matmuls_equal_those_of_an_export(precision, tmp_path):
    """Attributes, inputs and the manifest's block size are the same, so the same kernels run."""
    options = ExportOptions(precision, "cuda")
    exported = export_model(str(tiny_checkpoint("llama-untied")), tmp_path / "exported", options)
    vocabulary = load_model_directory(exported).vocab_size
    shape = Shape(64, 3, 4, 2, 16, 160, vocabulary, 512)  # the checkpoint's
    made = make_random_llama(tmp_path / "made", shape, precision, "cuda")

    assert _matmuls(exported) == _matmuls(made)
    blocks = {load_model_directory(f).manifest["symmetric_block_size"] for f in (exported, made)}
    assert {32} == blocks


def _matmuls(folder):
    graph = _graph(folder)
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {
        node.name: (
            {attribute.name: attribute.i for attribute in node.attribute},
            [types.get(name) for name in node.input],
        )
        for node in graph.node
        if node.op_type == "MatMulNBits"
    }


def _graph(folder):
    return onnx.load(folder / "model.onnx", load_external_data=False).graph


def _operators(folder):
    return Counter((node.domain, node.op_type) for node in _graph(folder).node)


def _interface(folder):
    graph = _graph(folder)
    return {
        value.name: (value.type.tensor_type.elem_type, len(value.type.tensor_type.shape.dim))
        for value in (*graph.input, *graph.output)
    }


def test_the_tokenizer_has_a_token_for_each_byte(model):
    """Any text survives encoding and decoding, with token ids within the vocabulary."""
    tokenizer = Tokenizer(model.tokenizer.read_text())
    text = "Zwölf Boxkämpfer, 十二\n"
    ids = tokenizer.encode(text)

    assert text == tokenizer.decode(ids)
    assert max(ids) < model.vocab_size


def test_folder_is_created_atomically(tmp_path, monkeypatch):
    """A failed attempt leaves no folder of that name and can be repeated."""
    shape = dataclasses.replace(SHAPES["tiny"], layers=1)
    with monkeypatch.context() as patch:
        patch.setattr("bench.random_llama._write_text_side", None)
        with pytest.raises(TypeError):
            make_random_llama(tmp_path / "model", shape, "fp32")

    assert not (tmp_path / "model").exists()
    assert make_random_llama(tmp_path / "model", shape, "fp32").is_dir()
