"""A checkpoint's config.json: whether it can be exported, translated for transformers 4.

Does not need torch, so a model on the hub is refused before its weights are fetched. Refuses what
would export without an error and then generate nonsense.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from generator_svc.export.errors import ExportError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_oss")
# Rope types whose frequencies do not depend on the length of the sequence.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def read_config(label: str, file: Path) -> dict[str, Any]:
    """The settings in `file`, under the names that transformers 4 uses.

    Raises ExportError, with a message that begins with `label`, if the family, rope type or
    quantisation is not supported.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{label}: config.json is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ExportError(f"{label}: config.json is not a JSON object")
    check_family(label, config.get("model_type"))
    for name in ("rope_scaling", "rope_parameters", "quantization_config"):
        if not isinstance(config.get(name) or {}, dict):
            raise ExportError(f"{label}: config.json: {name} is not a JSON object")
    try:
        config = translate_rope(config)
        check_rope(config.get("rope_scaling"))
        config = extend_context(config)
    except ExportError as error:
        raise ExportError(f"{label}: {error}") from None
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if quantization and (config["model_type"], method) != ("gpt_oss", "mxfp4"):
        raise ExportError(
            f"{label}: is already quantised ({method}); export the full-precision checkpoint"
        )
    return config


def check_family(label: str, family: object) -> None:
    """Raises ExportError unless `family` is one of `FAMILIES`."""
    if family not in FAMILIES:
        raise ExportError(
            f"{label}: model type {family!r} is not supported (supported: {', '.join(FAMILIES)})"
        )


def translate_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rewrites the rope settings of transformers 5 for transformers 4.

    Version 5 saves `rope_parameters` and drops `rope_theta` and `rope_scaling`. Version 4 silently
    ignores the new name and falls back to a theta of 10,000.
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


def check_rope(scaling: dict[str, Any] | None) -> None:
    """Raises ExportError unless the rope type is one of `STATIC_ROPE`."""
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in STATIC_ROPE:
        raise ExportError(
            f"rope type {kind!r} is not supported: its frequencies change with the length of the "
            f"sequence (supported: {', '.join(STATIC_ROPE)})"
        )


def extend_context(config: dict[str, Any]) -> dict[str, Any]:
    """Extends the context length as YaRN does.

    Model cards say to add `rope_scaling` to config.json, without changing the length.
    """
    scaling = config.get("rope_scaling") or {}
    length, factor = config.get("max_position_embeddings"), scaling.get("factor")
    original = scaling.get("original_max_position_embeddings")
    is_yarn = scaling.get("rope_type", scaling.get("type")) == "yarn"
    # Values of other types are refused where they are used.
    if not (is_yarn and isinstance(length, int) and isinstance(original, int)):
        return config
    if not isinstance(factor, int | float):
        return config
    return config | {"max_position_embeddings": max(length, int(factor * original))}
