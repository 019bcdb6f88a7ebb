"""Sizes of the published models on disk, in memory and on a card, from their configurations.

Makes the tables of docs/models.md, where `make docs` writes them. Sizes of exported folders follow
the exporter's formats: blocks of 32 weights share a scale, and a zero point unless they are
symmetric; norms and biases keep the activations' dtype.
"""

from __future__ import annotations

import math
from typing import Any

from bench.published import PUBLISHED
from bench.random_checkpoint import CheckpointTensor, checkpoint_tensors
from generator_svc.config import CUDA_DEFAULTS
from generator_svc.memory_plan import CUDA_GRAPH_BYTES

BLOCK = 32
# The precisions on each device, in the order of the tables; gpt-oss has only some of them.
DEVICES = {"cuda": ("fp16", "int8", "int4"), "cpu": ("w8a8", "int8", "int4", "fp32")}
MODELS = ("deepseek-r1-distill-llama-8b", "qwen-2.5-7b", "gpt-oss-120b", "gpt-oss-20b")
# Bytes available to CUDA, by the card's nominal GB: an L4, an L40S, an H100 and an H200.
CARDS = {24: 22.5 * 2**30, 48: 44.5 * 2**30, 80: 78 * 2**30, 141: 139 * 2**30}


def checkpoint_bytes(config: dict[str, Any]) -> int:
    """Bytes of all tensors, as published."""
    return sum(tensor.size for tensor in checkpoint_tensors(config))


def cached_bytes(config: dict[str, Any], device: str) -> int:
    """Bytes of one token in the KV cache, which is float16 on CUDA and float32 on the CPU."""
    layers, kv_heads = int(config["num_hidden_layers"]), int(config["num_key_value_heads"])
    return 2 * layers * kv_heads * _head_size(config) * _float_bytes(device)


def folder_bytes(config: dict[str, Any], precision: str, device: str) -> int:
    """Bytes of the exported weights on disk; on the CPU they take the same amount of memory."""
    return _weight_bytes(config, precision, device, mxfp4_scales=1)


def loaded_bytes(config: dict[str, Any], precision: str, device: str) -> int:
    """Bytes of the weights on the device; on CUDA, MXFP4 has float16 scales besides the
    exponents."""
    return _weight_bytes(config, precision, device, mxfp4_scales=3)


def _weight_bytes(config: dict[str, Any], precision: str, device: str, mxfp4_scales: int) -> int:
    """`mxfp4_scales` is the number of bytes per block for its scale on CUDA."""
    floats = _float_bytes(device) if precision != "fp32" else 4
    rotary = int(config["max_position_embeddings"]) * _head_size(config) * floats
    return rotary + sum(
        _tensor_bytes(tensor, precision, floats, device, mxfp4_scales)
        for tensor in checkpoint_tensors(config)
    )


def _tensor_bytes(
    tensor: CheckpointTensor, precision: str, floats: int, device: str, mxfp4_scales: int
) -> int:
    elements, name = math.prod(tensor.shape), tensor.name
    if tensor.kind == "blocks":
        if device == "cuda":
            return elements
        return elements if precision == "int4" else 2 * elements
    if tensor.kind == "scales":
        return elements * (mxfp4_scales if device == "cuda" else floats)
    is_matrix = len(tensor.shape) == 2 and name.endswith("proj.weight")
    is_vocabulary = name in ("lm_head.weight", "model.embed_tokens.weight")
    if precision in ("fp16", "fp32") or not (is_matrix or is_vocabulary):
        return elements * floats
    blocks = tensor.shape[0] * -(-tensor.shape[1] // BLOCK)
    if is_vocabulary:
        return blocks * (BLOCK + floats)
    is_symmetric = device == "cuda"
    if precision == "int4":
        return blocks * BLOCK // 2 + blocks * floats + (0 if is_symmetric else blocks // 2)
    if precision == "w8a8" and "down_proj" not in name:
        return elements + tensor.shape[0] * floats
    return blocks * (BLOCK + floats + (0 if is_symmetric else 1))


def _float_bytes(device: str) -> int:
    return 2 if device == "cuda" else 4


def _head_size(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def precisions(config: dict[str, Any], device: str) -> list[str]:
    """The precisions that a model with this configuration has on the device."""
    has_experts = "num_local_experts" in config
    return [p for p in DEVICES[device] if not has_experts or p not in ("w8a8", "fp32")]


def sizes_markdown() -> str:
    """Disk and memory sizes of each model in each precision."""
    lines = [
        "| model | options | checkpoint | folder | weights in memory | cache of 1,000 tokens |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for model in MODELS:
        config = PUBLISHED[model].config
        for device in DEVICES:
            for precision in precisions(config, device):
                row = [
                    f"`{model}`",
                    f"`--device {device} --precision {precision}`",
                    _gb(checkpoint_bytes(config)),
                    _gb(folder_bytes(config, precision, device)),
                    _gb(loaded_bytes(config, precision, device)),
                    _gb(1000 * cached_bytes(config, device), 3),
                ]
                lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def cards_markdown() -> str:
    """How many tokens the KV cache holds besides the weights, on cards of several sizes."""
    share = CUDA_DEFAULTS["kv_memory_share"]
    lines = [
        f"| model | precision | {' | '.join(f'{card} GB' for card in CARDS)} |",
        f"| --- | --- | {' | '.join('---:' for _ in CARDS)} |",
    ]
    for model in MODELS:
        config = PUBLISHED[model].config
        for precision in precisions(config, "cuda"):
            weights = loaded_bytes(config, precision, "cuda")
            tokens = [
                int(share * (usable - weights - CUDA_GRAPH_BYTES) / cached_bytes(config, "cuda"))
                for usable in CARDS.values()
            ]
            shown = [f"{count // 1000 * 1000:,}" if count >= 1000 else "—" for count in tokens]
            lines.append(f"| `{model}` | {precision} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _gb(size: float, digits: int = 1) -> str:
    return f"{size / 1e9:,.{digits}f} GB"
