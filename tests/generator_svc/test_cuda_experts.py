"""gpt-oss on a CUDA device, loaded as the service loads it, compared with PyTorch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from generator_svc.config import GeneratorSettings
from generator_svc.export import export_model
from generator_svc.export.checkpoint.checkpoint import load_checkpoint
from generator_svc.export.checkpoint.source import locate
from generator_svc.metering import Meter
from generator_svc.plan import Chunk, Row, StepPlan
from generator_svc.startup import load_runner, warm_up
from tests.generator_svc.export.test_export_experts import HALF, exported
from tests.tiny_models import tiny_checkpoint
from trivium.model_directory import load_model_directory

TOLERANCE = 0.15  # float16; without any one of gpt-oss's peculiarities they are off by over 1
LENGTHS = (5, 40, 61)  # within the window of 24, and beyond


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("cuda") / "gpt-oss"
    return export_model(str(tiny_checkpoint("gpt-oss")), out, HALF)


@pytest.fixture(scope="module", params=["fp4", "int8"])
def runner(request, folder, tmp_path_factory):
    """Experts in MXFP4 as the exporter makes them for CUDA, or the same values in eight bits."""
    model = load_model_directory(folder)
    if request.param == "int8":
        scratch = tmp_path_factory.mktemp("int8")
        graph = exported(scratch, tiny_checkpoint("gpt-oss"), request.param, HALF)
        model = replace(model, graph=graph)
    settings = GeneratorSettings(
        model_directory=folder, device="cuda", slots=len(LENGTHS), max_sequence_length=128
    )
    runner = load_runner(settings, model)
    warm_up(settings, runner, Meter())
    return runner


@pytest.fixture(scope="module")
def prompts():
    random = np.random.default_rng(3)
    return [[int(token) for token in random.integers(9, 600, length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def reference():
    model = load_checkpoint(locate(str(tiny_checkpoint("gpt-oss")))).model

    def logits(token_ids):
        with torch.inference_mode():
            return model(torch.tensor([token_ids])).logits[0, -1].numpy()

    return logits


def _prefill(runner, slot, token_ids):
    """Prefills in two chunks; returns the logits of the last token."""
    half = len(token_ids) // 2
    runner.run(StepPlan(chunks=(Chunk(slot, 0, tuple(token_ids[:half]), False),)))
    last = Chunk(slot, half, tuple(token_ids[half:]), True)
    result = runner.run(StepPlan(chunks=(last,))).chunks[0]
    assert result.error is None
    return np.array(result.logits[0])


@pytest.mark.gpu
def test_experts_on_the_device_equal_pytorch(runner, prompts, reference):
    """Prompts in chunks, then rows of different lengths decoded together, six steps."""
    for slot, prompt in enumerate(prompts):
        logits = _prefill(runner, slot, prompt)
        assert np.allclose(reference(prompt), logits, atol=TOLERANCE)
    texts = [list(prompt) for prompt in prompts]
    agreed = 0
    for step in range(6):
        rows = tuple(Row(100 + step, len(text)) for text in texts)
        result = runner.run(StepPlan(rows=rows)).rows
        for text, row in zip(texts, result.logits, strict=True):
            text.append(100 + step)
            expected, logits = reference(text), np.array(row)
            assert np.allclose(expected, logits, atol=TOLERANCE)
            agreed += int(expected.argmax() == logits.argmax())

    assert agreed >= 17
