"""A checkpoint as a PyTorch model in float32, and what the graph passes need of its shape.

Knows transformers and torch; knows nothing of ONNX. Refuses what would export cleanly and then
talk nonsense: unknown rope types, weights that are missing, attention the swap cannot express.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from generator_svc.export.checkpoint.decoder import Decoder, LayerAttention
from generator_svc.export.checkpoint.source import Source
from generator_svc.export.errors import ExportError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Rope types whose frequencies do not depend on the length of the sequence.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Checkpoint:
    """The loaded model, on the CPU, in float32 and evaluation mode."""

    source: Source
    model: PreTrainedModel
    decoder: Decoder

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config


def load_checkpoint(source: Source) -> Checkpoint:
    """Loads `source`; raises ExportError for a family or a setting that is not supported."""
    with quiet_libraries():
        model = _load_gguf(source) if source.kind == "gguf" else _load_folder(source)
    return Checkpoint(source, model.eval(), describe(model))


def translate_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rewrites the rope settings of transformers 5 for transformers 4.

    Version 5 saves `rope_parameters` and drops `rope_theta` and `rope_scaling`. Version 4 ignores
    the new name without a word and falls back to a theta of 10,000.
    """
    config = dict(config)
    parameters = config.pop("rope_parameters", None)
    if parameters is None:
        return config
    if not isinstance(parameters, dict) or any(isinstance(v, dict) for v in parameters.values()):
        raise ExportError("rope_parameters that differ between layer types are not supported")
    scaling = dict(parameters)
    theta = scaling.pop("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise ExportError("rope_parameters has no rope_theta")
    if "partial_rotary_factor" in scaling:
        config["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    config["rope_theta"] = theta
    is_plain = scaling.get("rope_type", "default") == "default"
    config["rope_scaling"] = None if is_plain else scaling
    return config


def describe(model: PreTrainedModel) -> Decoder:
    """The decoder's shape, with rotary tables computed by the model's own rotary module."""
    config = model.config
    heads = config.num_attention_heads
    cos, sin = _rotary_tables(model, config.max_position_embeddings)
    return Decoder(
        family=config.model_type,
        num_attention_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden_size=config.hidden_size,
        context_length=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        norm_epsilon=config.rms_norm_eps,
        tied_embeddings=bool(config.tie_word_embeddings),
        layers=tuple(_layer_attention(layer.self_attn, config) for layer in model.model.layers),
        cos=cos.numpy(),
        sin=sin.numpy(),
    )


def _layer_attention(attention: Any, config: PretrainedConfig) -> LayerAttention:
    # Mistral keeps its window in the configuration only, Qwen in the layer.
    if config.model_type == "mistral":
        window = config.sliding_window
    else:
        window = getattr(attention, "sliding_window", None)
    return LayerAttention(scale=float(attention.scaling), window=window)


def _rotary_tables(model: PreTrainedModel, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each [context, rotary size / 2], as the model's forward computes them."""
    rotary = model.model.rotary_emb
    positions = torch.arange(context, dtype=torch.float32)
    angles = torch.outer(positions, rotary.inv_freq.float())
    scaling = float(rotary.attention_scaling)
    return angles.cos() * scaling, angles.sin() * scaling


def _load_folder(source: Source) -> PreTrainedModel:
    try:
        raw = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{source.path / 'config.json'}: not JSON: {error}") from None
    raw = translate_rope(raw)
    family = raw.pop("model_type", None)
    if family not in FAMILIES:
        raise ExportError(_unsupported_family(family))
    if raw.get("quantization_config"):
        raise ExportError(f"{source.label}: is quantised already; export the full-precision one")
    config = AutoConfig.for_model(family, **raw)
    _check_rope(config)
    return _from_pretrained(source, str(source.path), config=config)


def _load_gguf(source: Source) -> PreTrainedModel:
    folder, name = str(source.path.parent), source.path.name
    try:
        config = AutoConfig.from_pretrained(folder, gguf_file=name)
    except (ValueError, KeyError, OSError) as error:
        raise ExportError(f"{source.path}: not a GGUF file that can be read: {error}") from error
    if config.model_type not in FAMILIES:
        raise ExportError(_unsupported_family(config.model_type))
    _check_rope(config)
    return _from_pretrained(source, folder, config=config, gguf_file=name)


def _from_pretrained(source: Source, folder: str, **options: Any) -> PreTrainedModel:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ExportError(f"{source.label}: the weights do not load: {error}") from error
    missing = sorted(report["missing_keys"]) + sorted(str(k) for k in report["mismatched_keys"])
    if missing:
        raise ExportError(f"{source.label}: {len(missing)} weights do not fit, e.g. {missing[0]}")
    return model


def _check_rope(config: PretrainedConfig) -> None:
    scaling = getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in STATIC_ROPE:
        raise ExportError(
            f"rope type {kind!r} is not supported: its frequencies change with the length of the "
            f"sequence (supported: {', '.join(STATIC_ROPE)})"
        )


def _unsupported_family(family: str | None) -> str:
    if family == "gpt_oss":
        return (
            "gpt_oss is not supported: its experts would need the QMoE operator; "
            "attention sinks and sliding windows alone would not be enough"
        )
    return f"model type {family!r} is not supported (supported: {', '.join(FAMILIES)})"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hides the chatter of torch, transformers, optimum and of progress bars that are not ours."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    sink = io.StringIO()
    try:
        with redirect_stderr(sink), redirect_stdout(sink), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
