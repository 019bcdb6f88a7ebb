"""Which checkpoints load, which settings are translated, and what is refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

from generator_svc.export import ExportError
from generator_svc.export.checkpoint.checkpoint import load_checkpoint
from generator_svc.export.checkpoint.config import translate_rope
from generator_svc.export.checkpoint.source import Source, locate
from tests.tiny_models import tiny_checkpoint


def changed(tmp_path: Path, **changes: object) -> Source:
    """The tiny Llama with other values in its config.json."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return locate(str(folder))


def test_rope_parameters_become_theta_and_scaling():
    """The settings of transformers 5 are moved to where transformers 4 looks for them."""
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}

    assert translate_rope(new) == {
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    }


def test_default_rope_parameters_mean_no_scaling():
    """The type `default` is what transformers 4 writes as null."""
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "x": 1}

    assert translate_rope(new) == {"rope_theta": 1e6, "rope_scaling": None, "x": 1}


def test_old_settings_are_left_alone():
    """A configuration without the new name is not changed."""
    old = {"rope_theta": 1e4, "rope_scaling": None}

    assert translate_rope(old) == old


def test_rope_parameters_per_layer_type_are_refused():
    """Two rotary tables would be needed; one would be silently wrong."""
    nested = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}

    with pytest.raises(ExportError, match="layer types"):
        translate_rope(nested)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "'gemma2' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"quantization_config": {"quant_method": "awq"}}, r"already quantised \(awq\)"),
        (
            {"intermediate_size": 128},
            r"model.safetensors: model.layers.0.mlp.gate_proj.weight has shape \[160, 64\], "
            r"but config.json implies \[128, 64\]",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, "transformers cannot load its config.json: Key"),
        ({"max_position_embeddings": 17}, r"context length \(max_position_embeddings\) is 17;"),
        ({"max_position_embeddings": -1}, "is -1; the minimum is 18"),
        ({"max_position_embeddings": 10**9}, "is 1,000,000,000; the maximum is 4,194,304"),
        ({"hidden_size": "64"}, "transformers cannot load its config.json: TypeError: "),
        ({"head_dim": 24}, "head size 24 is not supported"),
        ({"head_dim": 15}, "head size 15 is not supported"),
        ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3 key-value heads"),
        (
            {"partial_rotary_factor": 0.5},
            r"partial rotary embeddings \(8 of 16\) are not supported",
        ),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"rope_scaling": "yarn"}, "config.json: rope_scaling is not a JSON object"),
        ({"rope_parameters": "yarn"}, "config.json: rope_parameters is not a JSON object"),
        ({"quantization_config": "awq"}, "config.json: quantization_config is not a JSON object"),
    ],
)
def test_unsupported_setting_is_named(tmp_path, changes, message):
    """Each refusal says which setting is the reason."""
    with pytest.raises(ExportError, match=message):
        load_checkpoint(changed(tmp_path, **changes))


def test_missing_weights_are_refused(tmp_path):
    """transformers would fill them with random numbers and a warning."""
    source = changed(tmp_path)
    file = source.path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, file, {"format": "pt"})

    message = "missing weights: model.layers.1.mlp.down_proj.weight$"
    with pytest.raises(ExportError, match=message):
        load_checkpoint(source)


@pytest.mark.parametrize(
    ("name", "is_read"),
    [
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("model.layers.3.input_layernorm.weight", False),
        ("model.norm.bias", False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("v_head.summary.weight", True),
    ],
)
def test_unused_weights_are_refused(tmp_path, name, is_read):
    """A layer without its bias gives nonsense. Saved rotary frequencies may be ignored."""
    source = changed(tmp_path)
    file = source.path / "model.safetensors"
    save_file(load_file(file) | {name: torch.ones(64)}, file, {"format": "pt"})

    if is_read:
        load_checkpoint(source)
        return
    with pytest.raises(ExportError, match=f"the weights contain {name}, which the architecture"):
        load_checkpoint(source)


def test_yarn_makes_the_context_longer(tmp_path):
    """Qwen's model cards say to add rope_scaling only, and promise 131,072 tokens."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

    decoder = load_checkpoint(
        changed(tmp_path, max_position_embeddings=40, rope_scaling=yarn)
    ).decoder

    assert decoder.context_length == 128
    assert len(decoder.cos) == 128


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            lambda name: name.removeprefix("model."),
            "missing weights: .* others; found embed_tokens.weight instead of "
            "model.embed_tokens.weight, so this is a base model; export one for text generation",
        ),
        (
            lambda name: f"language_model.{name}",
            "others; found language_model.model.embed_tokens.weight instead of "
            "model.embed_tokens.weight, so this model is part of a larger one$",
        ),
    ],
)
def test_weights_of_another_architecture_are_named(tmp_path, rename, message):
    """A base model without its head, or a vision model; found and expected names are shown."""
    source = changed(tmp_path)
    file = source.path / "model.safetensors"
    weights = {rename(name): weight for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})

    with pytest.raises(ExportError, match=message):
        load_checkpoint(source)


def test_integer_weights_are_refused(tmp_path):
    """They need scales from somewhere, or mean nothing."""
    source = changed(tmp_path)
    file = source.path / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(weights | {name: (50 * weights[name]).char()}, file, {"format": "pt"})

    with pytest.raises(
        ExportError, match=f"model.safetensors: {name} has type int8: is it quantised"
    ):
        load_checkpoint(source)


def test_a_broken_gguf_is_refused(tmp_path):
    """A file that is not a GGUF file gives one line, not a struct error."""
    (tmp_path / "model.gguf").write_bytes(b"not a model" * 100)

    with pytest.raises(ExportError, match="not a readable GGUF file"):
        load_checkpoint(locate(str(tmp_path / "model.gguf")))


def test_a_gguf_without_an_architecture_is_refused(tmp_path):
    """Here a byte of the field's name was changed."""
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content.replace(b"architecture", b"architectura"))

    with pytest.raises(ExportError, match="not a readable GGUF file"):
        load_checkpoint(locate(str(tmp_path / "model.gguf")))
