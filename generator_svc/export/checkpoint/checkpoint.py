"""A checkpoint as a PyTorch model that leaves its matrices on disk, and its shape.

Knows transformers and torch; knows nothing about ONNX. Refuses what would export without an error
and then generate nonsense: weights that are missing or have the wrong shape.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from generator_svc.export.checkpoint.config import check_family, read_config
from generator_svc.export.checkpoint.decoder import Decoder, Experts, LayerAttention
from generator_svc.export.checkpoint.files import CONFIG_FILE
from generator_svc.export.checkpoint.source import Source
from generator_svc.export.checkpoint.streamed import StreamedEmbedding, StreamedLinear
from generator_svc.export.checkpoint.streamed_experts import stream_experts
from generator_svc.export.checkpoint.tensors import Tensors, matrix, open_tensors
from generator_svc.export.errors import ExportError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BASE = "model."  # the prefix of all weights but the head's in transformers
ROPE_DIVISORS = "rope_freqs.weight"
# Weights that the model has to read, except experts, which are not PyTorch parameters, and rotary
# embeddings in old checkpoints, which follow from the configuration.
UNREAD = re.compile(r"model\.(layers\.(?!.*\.(experts\.|rotary_emb\.))|norm\.|embed_tokens\.)")
# In tokens: to verify an export, two are compared and sixteen generated.
MIN_CONTEXT_LENGTH = 18
# The graph has a table of cosines for every position, which takes 1 GiB at this length.
MAX_CONTEXT_LENGTH = 2**22
HEAD_SIZE_STEP = 16  # GroupQueryAttention only rotates heads whose size is a multiple of this
# transformers validates few settings: a wrong one raises some exception where it is used.
_SETTING_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Checkpoint:
    """The model in evaluation mode: matrices are streamed from the files, the rest is float32."""

    source: Source
    tensors: Tensors
    model: PreTrainedModel
    decoder: Decoder

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config


def load_checkpoint(source: Source) -> Checkpoint:
    """Opens `source`; raises ExportError if its family, settings or weights are not supported."""
    with quiet_libraries():
        config = _gguf_config(source) if source.kind == "gguf" else _folder_config(source)
        _check_context(source, config)
        model = _without_weights(source, config)
        _check_heads(source, model)
        tensors = open_tensors(source)
        if config.model_type == "gpt_oss":
            is_mxfp4 = getattr(config, "quantization_config", None) is not None
            stream_experts(model, tensors, is_mxfp4)
    _check_weights(source, model, tensors)
    _stream_weights(model, tensors)
    return Checkpoint(source, tensors, model.eval(), describe(model))


def describe(model: PreTrainedModel) -> Decoder:
    """The decoder's shape, with rotary tables of the model's own rotary module."""
    config = model.config
    heads, kv_heads, head_size = _heads(config)
    cos, sin = _rotary_tables(model, config.max_position_embeddings)
    return Decoder(
        family=config.model_type,
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
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
    """Cosines and sines, each [context, rotary size / 2], as the model's forward pass has them."""
    rotary = model.model.rotary_emb
    positions = torch.arange(context, dtype=torch.float32)
    angles = torch.outer(positions, rotary.inv_freq.float()).numpy().astype(np.float64)
    # Not by PyTorch: where several threads made a process's first call of its cosine (MKL), one of
    # them was off by up to 1.5e-4 (docs/log.md).
    cos, sin = (f(angles) * float(rotary.attention_scaling) for f in (np.cos, np.sin))
    return torch.from_numpy(cos.astype(np.float32)), torch.from_numpy(sin.astype(np.float32))


def _folder_config(source: Source) -> PretrainedConfig:
    config = read_config(source.label, source.path / CONFIG_FILE)
    try:
        return AutoConfig.for_model(config.pop("model_type"), **config)
    except _SETTING_ERRORS as error:
        raise _unreadable(source, error) from error


def _gguf_config(source: Source) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(str(source.path.parent), gguf_file=source.path.name)
    except (OSError, *_SETTING_ERRORS) as error:
        raise ExportError(f"{source.path}: not a readable GGUF file: {error}") from error
    check_family(source.label, config.model_type)
    if config.model_type == "gpt_oss":
        raise ExportError(
            f"{source.path}: gpt_oss is supported from safetensors only, not from GGUF files"
        )
    return config


def _check_context(source: Source, config: PretrainedConfig) -> None:
    length = config.max_position_embeddings
    if not isinstance(length, int) or length < MIN_CONTEXT_LENGTH:
        raise ExportError(
            f"{source.label}: the context length (max_position_embeddings) is {length!r}; the "
            f"minimum is {MIN_CONTEXT_LENGTH}"
        )
    if length > MAX_CONTEXT_LENGTH:
        raise ExportError(
            f"{source.label}: the context length (max_position_embeddings) is {length:,}; the "
            f"maximum is {MAX_CONTEXT_LENGTH:,}"
        )


def _check_heads(source: Source, model: PreTrainedModel) -> None:
    """Refuses models that transformers creates, but that it or ONNX Runtime cannot run."""
    config = model.config
    heads, kv_heads, size = _heads(config)
    rotated = 2 * len(model.model.rotary_emb.inv_freq)
    if config.num_hidden_layers < 1:
        message = "num_hidden_layers is 0"
    elif not isinstance(config.rms_norm_eps, int | float):
        message = f"rms_norm_eps is {config.rms_norm_eps!r}"
    elif heads % kv_heads:
        message = f"{heads} attention heads are not a multiple of {kv_heads} key-value heads"
    elif size % HEAD_SIZE_STEP:
        message = (
            f"head size {size} is not supported: ONNX Runtime's rotary embedding needs a "
            f"multiple of {HEAD_SIZE_STEP}"
        )
    elif rotated != size:
        message = f"partial rotary embeddings ({rotated} of {size}) are not supported"
    else:
        return
    raise ExportError(f"{source.label}: {message}")


def _heads(config: PretrainedConfig) -> tuple[int, int, int]:
    """The numbers of query heads and of key-value heads, and the size of a head."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, kv_heads, size


def _without_weights(source: Source, config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device, except for its rotary module, which needs no weights."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Its frequencies come from the configuration, not from the files.
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    except _SETTING_ERRORS as error:
        raise _unreadable(source, error) from error
    return model


def _unreadable(source: Source, error: Exception) -> ExportError:
    reason = (str(error).splitlines() or [""])[0]
    kind = type(error).__name__
    return ExportError(
        f"{source.label}: transformers cannot load its config.json: {kind}: {reason}"
    )


def _check_weights(source: Source, model: PreTrainedModel, tensors: Tensors) -> None:
    """Raises ExportError unless all weights are in the checkpoint, as floats of the right shape.

    The same goes for the divisors of the rotary frequencies, if a GGUF file has them.
    """
    known = set(tensors.names())
    tied = _tied(model)
    weights = {
        name: list(weight.shape)
        for name, weight in model.named_parameters(remove_duplicate=False)
        if name not in tied
    }
    if missing := sorted(weights.keys() - known):
        raise ExportError(f"{source.label}: {_missing_weights(missing, known)}")
    unread = sorted(name for name in known - weights.keys() if UNREAD.match(name))
    if unread:
        raise ExportError(
            f"{source.label}: the weights contain {unread[0]}{_and_others(unread)}, which the "
            "architecture in its configuration does not use: the results would be wrong"
        )
    if ROPE_DIVISORS in known:
        weights[ROPE_DIVISORS] = list(model.model.rotary_emb.inv_freq.shape)
    by = "its metadata" if source.kind == "gguf" else CONFIG_FILE
    for name, shape in weights.items():
        found = list(tensors.shape(name))
        if found != shape:
            raise ExportError(
                f"{tensors.file(name)}: {name} has shape {found}, but {by} implies {shape}"
            )
        kind = tensors.read(name, 0, 1).dtype
        if kind != "float32":
            raise ExportError(
                f"{tensors.file(name)}: {name} has type {kind}: is it quantised? export the "
                "full-precision checkpoint"
            )


def _missing_weights(missing: list[str], known: set[str]) -> str:
    """An error message: what is missing, and whether it is there under a longer or shorter name."""
    message = f"missing weights: {missing[0]}{_and_others(missing)}"
    for name in missing:
        if name.removeprefix(BASE) in known:
            return (
                f"{message}; found {name.removeprefix(BASE)} instead of {name}, so this is a "
                "base model; export one for text generation (…ForCausalLM)"
            )
        if longer := min((other for other in known if other.endswith(f".{name}")), default=None):
            message += f"; found {longer} instead of {name}"
            return f"{message}, so this model is part of a larger one"
    return message


def _and_others(names: list[str]) -> str:
    return f" and {len(names) - 1} others" if names[1:] else ""


def _tied(model: PreTrainedModel) -> set[str]:
    return {HEAD} if model.config.tie_word_embeddings else set()


def _stream_weights(model: PreTrainedModel, tensors: Tensors) -> None:
    """Replaces the weights on the meta device by streamed matrices, or small ones by values."""
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
    if ROPE_DIVISORS in set(tensors.names()):  # a GGUF file has no other rope scaling
        model.model.rotary_emb.inv_freq /= torch.from_numpy(tensors.read(ROPE_DIVISORS))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hides the output of torch, transformers and optimum, including their progress bars."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    sink = io.StringIO()
    try:
        with redirect_stderr(sink), redirect_stdout(sink), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
