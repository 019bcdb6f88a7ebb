"""The exported graph compared with the checkpoint in PyTorch and with Optimum's own runtime."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from generator_svc.export.checkpoint.checkpoint import (
    Checkpoint,
    load_checkpoint,
    quiet_libraries,
)
from generator_svc.export.checkpoint.config import translate_rope
from generator_svc.export.checkpoint.source import locate
from generator_svc.plan import Chunk, StepPlan
from generator_svc.run.runner import OrtRunner
from tests.tiny_gpt_oss import in_transformers
from tests.tiny_models import FAMILIES, tiny_checkpoint, tiny_model_directory
from trivium.model_directory import ModelDirectory, load_model_directory

TOLERANCE = 1e-4


@cache
def exported(family: str) -> ModelDirectory:
    return load_model_directory(tiny_model_directory(family))


@cache
def checkpoint(family: str) -> Checkpoint:
    return load_checkpoint(locate(str(tiny_checkpoint(family))))


@cache
def pytorch(family: str) -> PreTrainedModel:
    """The checkpoint as transformers itself loads it."""
    folder = tiny_checkpoint(family)
    if family == "gpt-oss":
        return in_transformers(folder)
    config = translate_rope(json.loads((folder / "config.json").read_text()))
    model_type = config.pop("model_type")
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=AutoConfig.for_model(model_type, **config), dtype=torch.float32
        )
    return model.float().eval()  # MXFP4 experts are loaded as bfloat16, which is exact


def reference(family: str, tokens: list[int]) -> np.ndarray:
    """Logits [positions, vocabulary] of the checkpoint."""
    with torch.inference_mode():
        return pytorch(family)(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_model_with_weights_on_disk_gives_the_same_logits(family, prompt):
    """Exports are verified against that model."""
    tokens = prompt(90)

    with torch.inference_mode():
        streamed = checkpoint(family).model(torch.tensor([tokens])).logits[0].numpy()

    np.testing.assert_allclose(streamed, reference(family, tokens), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama-yarn"])
def test_rotary_tables_are_rounded_once(family):
    """No library's fast cosine makes an export differ from the next one."""
    decoder, rotary = checkpoint(family).decoder, pytorch(family).model.rotary_emb
    positions = torch.arange(len(decoder.cos), dtype=torch.float32)
    angles = torch.outer(positions, rotary.inv_freq).numpy().astype(np.float64)

    for table, function in ((decoder.cos, np.cos), (decoder.sin, np.sin)):
        expected = function(angles) * rotary.attention_scaling
        np.testing.assert_array_equal(table, expected.astype(np.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_equals_the_checkpoint(family, slots, prompt):
    """Prefilling a prompt in one run gives the checkpoint's logits at the last position."""
    tokens = prompt(90)

    logits = slots(exported(family)).prefill(0, tokens)

    np.testing.assert_allclose(logits, reference(family, tokens)[-1], atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_position_equals_the_checkpoint(family, prompt):
    """If the logits of all tokens are requested, for instance to score a prompt."""
    tokens = prompt(90)
    runner = OrtRunner(exported(family), "cpu", 1, 128, threads=1)

    chunk = Chunk(0, 0, tuple(tokens), True, wants_all_logits=True)
    [result] = runner.run(StepPlan(chunks=(chunk,))).chunks

    np.testing.assert_allclose(result.all_logits, reference(family, tokens), atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_into_one_buffer_equal_the_checkpoint(family, chunk, slots, prompt):
    """A prompt in chunks, with past and present in one longer buffer, gives the same logits."""
    tokens = prompt(90)

    logits = slots(exported(family)).prefill(0, tokens, chunk)

    np.testing.assert_allclose(logits, reference(family, tokens)[-1], atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_rows_decode_as_if_alone(family, slots, prompt):
    """Rows of different lengths in one decode step each get their own checkpoint's logits."""
    lengths = [1, 5, 40, 77]
    prompts = [prompt(length, seed=length) for length in lengths]
    running = slots(exported(family), rows=len(lengths))
    for row, tokens in enumerate(prompts):
        running.prefill(row, tokens)

    logits = running.run(0, [[9]] * 4, [length + 1 for length in lengths])

    expected = np.stack([reference(family, [*tokens, 9])[-1] for tokens in prompts])
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_may_be_padded_on_the_right(family, slots, prompt):
    """Each gets the logits of its own last token, and so do the tokens after them."""
    tokens = [prompt(length, seed=length) for length in (30, 5, 17)]
    running = slots(exported(family), rows=3)
    padded = [[*row, *[0] * (32 - len(row))] for row in tokens]
    first = running.run(0, padded, [len(row) for row in tokens], width=32)
    second = running.run(0, [[9]] * 3, [len(row) + 1 for row in tokens])

    expected = np.stack([reference(family, [*row, 9])[-2:] for row in tokens], axis=1)
    np.testing.assert_allclose([first, second], expected, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_the_checkpoint(family, slots, prompt):
    """Forty greedy tokens are the checkpoint's, and they are not one token repeated."""
    tokens = prompt(12)
    running = slots(exported(family))

    generated = [int(running.prefill(0, tokens).argmax())]
    while len(generated) < 40:
        length = len(tokens) + len(generated)
        generated.append(int(running.run(0, [generated[-1:]], [length]).argmax()))

    expected = reference(family, [*tokens, *generated])[len(tokens) - 1 : -1].argmax(-1)
    assert generated == expected.tolist()
    assert len(set(generated)) > 5


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_greedy_tokens_equal_optimum(family, slots, prompt, tmp_path):
    """Optimum's own runtime on the untouched trace generates the same tokens."""
    from optimum.exporters.onnx import onnx_export_from_model
    from optimum.onnxruntime import ORTModelForCausalLM

    tokens = prompt(12)
    with quiet_libraries():
        onnx_export_from_model(
            pytorch(family),
            tmp_path,
            task="text-generation-with-past",
            no_post_process=True,
            do_validation=False,
        )
        oracle = ORTModelForCausalLM.from_pretrained(tmp_path, use_io_binding=False)
        output = oracle.generate(
            torch.tensor([tokens]),
            attention_mask=torch.ones((1, len(tokens)), dtype=torch.int64),
            max_new_tokens=24,
            do_sample=False,
        )
    expected = output[0, len(tokens) :].tolist()

    running = slots(exported(family))
    generated = [int(running.prefill(0, tokens).argmax())]
    while len(generated) < len(expected):
        length = len(tokens) + len(generated)
        generated.append(int(running.run(0, [generated[-1:]], [length]).argmax()))

    assert generated == expected


@pytest.mark.parametrize("family", ["llama-llama3", "llama-yarn", "llama-linear"])
def test_rope_scaling_matters(family, prompt):
    """Logits with rope scaling differ from those without, so a lost scaling would show."""
    tokens = prompt(90)

    assert not np.allclose(reference(family, tokens), reference("llama-untied", tokens), atol=0.1)


def test_rope_parameters_reach_the_tables():
    """A checkpoint saved by transformers 5 keeps its theta: 250, not the default of 10,000."""
    decoder = checkpoint("llama-transformers5").decoder

    half = decoder.head_size // 2
    slowest = np.float32(1) / np.float32(250.0) ** np.float32((half - 1) / half)
    np.testing.assert_allclose(decoder.cos[100, -1], np.cos(100 * slowest), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_few_operators_remain(family):
    """Attention, norms and projections are single operators; nothing else of the trace remains."""
    import onnx

    graph = onnx.load(exported(family).graph, load_external_data=False)
    counts: dict[str, int] = {}
    for node in graph.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1

    assert counts["GroupQueryAttention"] == 3
    assert counts["SkipSimplifiedLayerNormalization"] == 6
    assert counts["SimplifiedLayerNormalization"] == 1
    assert counts["MatMul"] == 4 * 3  # qkv, o, gate and up, down
    assert len(graph.graph.node) < 60
    assert graph.ir_version <= 13
    assert {i.name for i in graph.graph.input} >= {"input_ids", "attention_mask"}
    assert "position_ids" not in {i.name for i in graph.graph.input}


def test_tied_weights_are_stored_once():
    """A tied head reads the embedding, so the file holds the vocabulary once."""
    tied, untied = (
        (exported(family).path / "model.onnx.data").stat().st_size
        for family in ("llama", "llama-untied")
    )

    table = 4 * exported("llama").vocab_size * 64
    assert abs((untied - tied) - table) < 0.05 * table
