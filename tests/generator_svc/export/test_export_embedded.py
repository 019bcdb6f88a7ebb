"""The embedded model: a GGUF file becomes a model folder with its own tokenizer and template."""

from __future__ import annotations

import numpy as np
import pytest
from jinja2 import Environment
from transformers import PreTrainedTokenizerFast

from generator_svc.export.weights.int8 import quantize_symmetric
from trivium.cli.models import find_model
from trivium.embedded_model import EMBEDDED_MODEL
from trivium.model_directory import ModelDirectory, load_model_directory

pytestmark = [pytest.mark.embedded, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def model() -> ModelDirectory:
    """The folder that is served by default, exported if it does not exist."""
    return load_model_directory(find_model(EMBEDDED_MODEL, "auto").folder)


@pytest.fixture(scope="module")
def tokenizer(model) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(model.tokenizer))


def test_it_answers(model, tokenizer, slots):
    """With greedy decoding, through template, tokenizer and graph."""
    assert model.chat_template is not None
    template = Environment(autoescape=False).from_string(model.chat_template.read_text())
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = template.render(messages=messages, add_generation_prompt=True)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    running = slots(model)

    generated = [int(running.prefill(0, tokens).argmax())]
    while generated[-1] not in model.eos_token_ids and len(generated) < 20:
        length = len(tokens) + len(generated)
        generated.append(int(running.run(0, [generated[-1:]], [length]).argmax()))

    assert tokenizer.decode(generated[:-1]) == "The capital of France is Paris."


def test_control_tokens_are_those_of_chatml(model, tokenizer):
    """A turn ends with <|im_end|>, which the file names, or with <|endoftext|>."""
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    assert model.eos_token_ids == (2, 0)
    assert '"eos_token": "<|im_end|>"' in model.tokenizer_config.read_text()


def test_digits_are_split_and_nothing_is_added(tokenizer):
    """As in training: one token per digit, no BOS, no sentencepiece space."""
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.encode("in") == tokenizer.encode("in", add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode("a ▁ b 龜 \U0001fae0")) == "a ▁ b 龜 \U0001fae0"


def test_int8_loses_little_quality(model):
    """The measured loss of quality is in the manifest, and small."""
    agreement = model.manifest["agreement"]

    assert agreement["mean_kl_divergence"] < 0.02
    assert agreement["perplexity"] < 1.03 * agreement["perplexity_checkpoint"]


def test_sampling_defaults_are_written(model):
    """A GGUF file contains none."""
    assert model.generation_config["do_sample"] is False


def test_prefill_in_chunks_is_bitwise_equal(model, slots):
    """With chunks of two or more tokens; attention uses another kernel for a single token."""
    tokens = [int(token) for token in np.random.default_rng(1).integers(20, 40_000, 115)]

    whole = slots(model).prefill(0, tokens)

    for chunk in (64, 50, 32, 14):
        np.testing.assert_array_equal(slots(model).prefill(0, tokens, chunk), whole)


def test_eight_bit_rows_reproduce_q8_0():
    """Blocks whose largest magnitude is 127 steps, as in GGUF embeddings, are restored exactly."""
    generator = np.random.default_rng(0)
    steps = generator.integers(-126, 127, (5, 3, 32)).astype(np.float32)
    steps[..., 7] = 127
    scales = generator.random((5, 3), np.float32).astype(np.float16).astype(np.float32)
    weight = (steps * scales[..., None]).reshape(5, 96)

    quantized, got = quantize_symmetric(weight)

    restored = (quantized.astype(np.float32) - 128) * got[..., None]
    np.testing.assert_allclose(restored.reshape(5, 96), weight, rtol=1e-6)
