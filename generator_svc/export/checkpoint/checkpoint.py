"""A checkpoint as a PyTorch model that leaves its matrices on the disk, and its shape.

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

from generator_svc.export.checkpoint.decoder import Decoder, Experts, LayerAttention
from generator_svc.export.checkpoint.source import Source
from generator_svc.export.checkpoint.streamed import StreamedEmbedding, StreamedLinear
from generator_svc.export.checkpoint.streamed_experts import stream_experts
from generator_svc.export.checkpoint.tensors import Tensors, matrix, open_tensors
from generator_svc.export.errors import ExportError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_oss")
# Rope types whose frequencies do not depend on the length of the sequence.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROPE_DIVISORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Checkpoint:
    """The model in evaluation mode: matrices are streamed from the files, all else is float32."""

    source: Source
    tensors: Tensors
    model: PreTrainedModel
    decoder: Decoder

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config


def load_checkpoint(source: Source) -> Checkpoint:
    """Opens `source`; raises ExportError for a family or a setting that is not supported."""
    with quiet_libraries():
        config = _gguf_config(source) if source.kind == "gguf" else _folder_config(source)
        if config.model_type not in FAMILIES:
            raise ExportError(_unsupported_family(config.model_type))
        _check_rope(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        tensors = open_tensors(source)
        if config.model_type == "gpt_oss":
            is_mxfp4 = getattr(config, "quantization_config", None) is not None
            stream_experts(model, tensors, is_mxfp4)
    _check_weights(source, model, tensors)
    _stream_weights(model, tensors)
    return Checkpoint(source, tensors, model.eval(), describe(model))


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
        experts=_experts(model) if config.model_type == "gpt_oss" else None,
    )


def _experts(model: PreTrainedModel) -> Experts:
    layers = [layer.mlp.experts for layer in model.model.layers]
    return Experts(
        chosen=model.config.num_experts_per_tok,
        alpha=layers[0].alpha,
        limit=layers[0].limit,
        layers=tuple((layer.gate_up, layer.down) for layer in layers),
    )


def _layer_attention(attention: Any, config: PretrainedConfig) -> LayerAttention:
    # Mistral keeps its window in the configuration only, Qwen in the layer.
    if config.model_type == "mistral":
        window = config.sliding_window
    else:
        window = getattr(attention, "sliding_window", None)
    sinks = getattr(attention, "sinks", None)
    return LayerAttention(
        scale=float(attention.scaling),
        window=window,
        sinks=None if sinks is None else sinks.detach().numpy(),
    )


def _rotary_tables(model: PreTrainedModel, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each [context, rotary size / 2], as the model's forward computes them."""
    rotary = model.model.rotary_emb
    positions = torch.arange(context, dtype=torch.float32)
    angles = torch.outer(positions, rotary.inv_freq.float())
    scaling = float(rotary.attention_scaling)
    return angles.cos() * scaling, angles.sin() * scaling


def _folder_config(source: Source) -> PretrainedConfig:
    try:
        raw = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{source.path / 'config.json'}: not JSON: {error}") from None
    raw = translate_rope(raw)
    family = raw.pop("model_type", None)
    if family not in FAMILIES:
        raise ExportError(_unsupported_family(family))
    quantization = raw.get("quantization_config")
    is_mxfp4 = family == "gpt_oss" and (quantization or {}).get("quant_method") == "mxfp4"
    if quantization and not is_mxfp4:
        raise ExportError(f"{source.label}: is quantised already; export the full-precision one")
    return AutoConfig.for_model(family, **raw)


def _gguf_config(source: Source) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(str(source.path.parent), gguf_file=source.path.name)
    except (ValueError, KeyError, OSError) as error:
        raise ExportError(f"{source.path}: not a GGUF file that can be read: {error}") from error
    if config.model_type == "gpt_oss":
        raise ExportError(f"{source.path}: gpt_oss is read from safetensors, not from GGUF files")
    return config


def _check_weights(source: Source, model: PreTrainedModel, tensors: Tensors) -> None:
    """Every weight of the model is in the checkpoint, in the model's own shape."""
    known = set(tensors.names())
    tied = _tied(model)
    wrong = [
        name
        for name, weight in model.named_parameters(remove_duplicate=False)
        if name not in tied and (name not in known or tensors.shape(name) != tuple(weight.shape))
    ]
    if wrong:
        raise ExportError(f"{source.label}: {len(wrong)} weights do not fit, e.g. {min(wrong)}")


def _tied(model: PreTrainedModel) -> set[str]:
    return {HEAD} if model.config.tie_word_embeddings else set()


def _stream_weights(model: PreTrainedModel, tensors: Tensors) -> None:
    """Gives every module of the model on the meta device its weights, or the way to them."""
    tied = _tied(model)
    for name, module in list(model.named_modules()):
        weight = f"{name}.weight"
        if isinstance(module, torch.nn.Linear):
            origin = EMBEDDING if weight in tied else weight
            bias = None
            if module.bias is not None:
                bias = torch.from_numpy(tensors.read(f"{name}.bias"))
            model.set_submodule(name, StreamedLinear(matrix(tensors, origin), bias))
        elif isinstance(module, torch.nn.Embedding):
            model.set_submodule(name, StreamedEmbedding(matrix(tensors, weight)))
        else:
            for own, _ in list(module.named_parameters(recurse=False)):
                value = torch.from_numpy(tensors.read(f"{name}.{own}"))
                setattr(module, own, torch.nn.Parameter(value, requires_grad=False))
    # Its frequencies come from the configuration, not from the files.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    if ROPE_DIVISORS in set(tensors.names()):  # of a GGUF file, which has no rope scaling else
        model.model.rotary_emb.inv_freq /= torch.from_numpy(tensors.read(ROPE_DIVISORS))


def _check_rope(config: PretrainedConfig) -> None:
    scaling = getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in STATIC_ROPE:
        raise ExportError(
            f"rope type {kind!r} is not supported: its frequencies change with the length of the "
            f"sequence (supported: {', '.join(STATIC_ROPE)})"
        )


def _unsupported_family(family: str | None) -> str:
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
