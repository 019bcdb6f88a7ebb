"""The tokenizer and chat template of a model directory, as plain files.

Files of a Hugging Face folder are copied unchanged, so that no tokenizer class is needed for them
(transformers 5 names one that version 4 does not know).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from generator_svc.export.checkpoint.checkpoint import quiet_libraries
from generator_svc.export.checkpoint.files import (
    SLOW_TOKENIZER_FILES,
    TOKENIZER_FILE,
    TOOL_TEMPLATE_FILE,
)
from generator_svc.export.checkpoint.source import Source
from generator_svc.export.errors import ExportError
from generator_svc.export.gguf_tokenizer import GgufTokenizer

COPIED = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# What transformers raises for files that are missing, damaged or not as expected.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)


def write_tokenizer(source: Source, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`."""
    if source.kind == "gguf":
        _convert_gguf(source.path, folder)
    elif (source.path / TOKENIZER_FILE).is_file():
        _copy(source.path, folder)
    else:
        _convert_slow(source, folder)
    _check(source, folder)
    _place_chat_template(source, folder)


def encode(folder: Path, text: str) -> list[int]:
    """Token ids of plain text, without special tokens that the tokenizer would add."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER_FILE))
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _copy(origin: Path, folder: Path) -> None:
    for name in COPIED:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    if not (folder / "tokenizer_config.json").is_file():
        _write_json(folder / "tokenizer_config.json", {})


def _convert_slow(source: Source, folder: Path) -> None:
    """Converts a folder without tokenizer.json, for example with only a SentencePiece model."""
    if not any((source.path / name).is_file() for name in SLOW_TOKENIZER_FILES):
        raise ExportError(
            f"{source.label}: has no tokenizer: neither {TOKENIZER_FILE} nor files to convert "
            f"({', '.join(SLOW_TOKENIZER_FILES)})"
        )
    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(source.path)
    except _UNREADABLE as error:
        raise _no_tokenizer(source.label, error) from error
    _save(tokenizer, folder)


def _no_tokenizer(label: str, error: Exception) -> ExportError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ExportError(f"{label}: unreadable tokenizer: {reason}")


def _save(tokenizer: Any, folder: Path) -> None:
    if not tokenizer.is_fast:
        raise ExportError("the tokenizer cannot be converted to tokenizer.json")
    scratch = folder / ".tokenizer"
    tokenizer.save_pretrained(scratch)
    _copy(scratch, folder)
    shutil.rmtree(scratch)


def _check(source: Source, folder: Path) -> None:
    """Raises ExportError if the tokenizer files cannot be read."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(
            f"{source.label}: tokenizer_config.json is not valid JSON: {error}"
        ) from None
    if not isinstance(config, dict):
        raise ExportError(f"{source.label}: tokenizer_config.json is not a JSON object")
    try:
        Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as error:  # the library raises nothing more specific
        raise ExportError(f"{source.label}: {TOKENIZER_FILE} cannot be read: {error}") from error


def _place_chat_template(source: Source, folder: Path) -> None:
    """Puts it into chat_template.jinja; if tools have one too, both into tokenizer_config.json."""
    file, config_file = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    tool_file = source.path / TOOL_TEMPLATE_FILE
    if file.is_file() and tool_file.is_file():
        texts = {"default": file, "tool_use": tool_file}
        config["chat_template"] = [
            {"name": name, "template": path.read_text(encoding="utf-8")}
            for name, path in texts.items()
        ]
        _write_json(config_file, config)
        file.unlink()
    if file.is_file():
        return
    template = config.get("chat_template")
    if isinstance(template, list):
        try:
            named = {entry["name"]: entry["template"] for entry in template}
        except (TypeError, KeyError):
            raise ExportError(
                f"{source.label}: tokenizer_config.json: chat_template must be a string or a "
                "list of named templates"
            ) from None
        template = None if "tool_use" in named else named.get("default")
    if isinstance(template, str):
        file.write_text(template, encoding="utf-8")


def _convert_gguf(path: Path, folder: Path) -> None:
    tokenizer = GgufTokenizer(path)
    special = tokenizer.special_tokens
    config = special | {
        "add_bos_token": tokenizer.adds_bos,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(folder / TOKENIZER_FILE, tokenizer.definition())
    _write_json(folder / "tokenizer_config.json", config)
    named = {role: token for role, token in special.items() if token is not None}
    _write_json(folder / "special_tokens_map.json", named)
    if tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
