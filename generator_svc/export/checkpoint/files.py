"""Which files of a checkpoint are read, by name; the same for a folder and for the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

from generator_svc.export.errors import ExportError

Kind = Literal["folder", "gguf"]

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
TOOL_TEMPLATE_FILE = "additional_chat_templates/tool_use.jinja"
TEXT_FILES = (
    "generation_config.json",
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    TOOL_TEMPLATE_FILE,
)
# What tokenizer.json is made from if there is none.
SLOW_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")

_PART_OF_GGUF = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
_MAX_NAMES_SHOWN = 8


def choose_files(
    label: str,
    names: Collection[str],
    index: Callable[[], Path],
    gguf: str | None = None,
    separator: str = "/",
) -> tuple[Kind, list[str]]:
    """Chooses the files of a checkpoint to read: configuration, tokenizer and weights.

    `names` are relative to the checkpoint's folder. `index` returns the path of the shards' index;
    it is only called if `names` has one. Safetensors are preferred to GGUF, unless `gguf` is the
    name of a file, or the quantisation in its name (Q4_K_M). Raises ExportError, with a message
    that begins with `label`, if something is missing or the choice is ambiguous; an example in the
    message is written as `label`, `separator` and a file name.
    """
    if gguf is not None:
        return "gguf", [_find_gguf(label, names, gguf)]
    if INDEX_FILE in names or WEIGHTS_FILE in names:
        if CONFIG_FILE not in names:
            raise ExportError(f"{label}: has weights but no {CONFIG_FILE}")
        slow = () if TOKENIZER_FILE in names else SLOW_TOKENIZER_FILES
        small = [name for name in (CONFIG_FILE, *TEXT_FILES, *slow) if name in names]
        if WEIGHTS_FILE in names:  # before shards, as in transformers
            return "folder", [*small, WEIGHTS_FILE]
        return "folder", [*small, INDEX_FILE, *_shards(label, names, index())]
    found = [name for name in names if name.endswith(".gguf")]
    if len(found) > 1:
        example = f"{label}{separator}{min(found)}"
        raise ExportError(
            f"{label}: has {len(found)} GGUF files; name one, as in {example}: {_listed(found)}"
        )
    if found:
        return "gguf", [check_is_whole(label, found[0])]
    raise ExportError(_no_weights(label, names))


def check_is_whole(label: str, gguf: str) -> str:
    """Returns `gguf`; raises ExportError if it is one part of a split model."""
    part = _PART_OF_GGUF.search(gguf)
    if part and int(part[1]) > 1:
        raise ExportError(
            f"{label}: {gguf} is one of {int(part[1])} parts; merge them with llama-gguf-split "
            "--merge"
        )
    return gguf


def _find_gguf(label: str, names: Collection[str], wanted: str) -> str:
    ggufs = [name for name in names if name.endswith(".gguf")]
    if wanted in ggufs:
        return check_is_whole(label, wanted)
    tag = re.compile(rf"(^|[-._/]){re.escape(wanted)}[-./]", re.IGNORECASE)
    found = [name for name in ggufs if tag.search(name)]
    if len(found) == 1:
        return check_is_whole(label, found[0])
    if found:
        raise ExportError(f"{label}: {wanted} matches {len(found)} files: {_listed(found)}")
    raise ExportError(f"{label}: has no {wanted}; its GGUF files: {_listed(ggufs) or 'none'}")


def _shards(label: str, names: Collection[str], index: Path) -> list[str]:
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ExportError(f"{label}: {INDEX_FILE} is not an index of tensors by file") from None
    missing = [shard for shard in shards if shard not in names]
    if missing:
        raise ExportError(f"{label}: {INDEX_FILE} names missing files: {_listed(missing)}")
    return shards


def _no_weights(label: str, names: Collection[str]) -> str:
    message = f"{label}: has neither {WEIGHTS_FILE} (or its index of shards) nor a GGUF file"
    if not names:
        return f"{message}; it is empty"
    if any(name.endswith((".bin", ".pth", ".pt")) for name in names):
        message += (
            "; PyTorch pickles are not supported: save the model as safetensors with transformers"
        )
    return f"{message}; it has {_listed(names)}"


def _listed(names: Collection[str]) -> str:
    shown = sorted(names)[:_MAX_NAMES_SHOWN]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
