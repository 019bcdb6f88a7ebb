"""The text side of a model directory: tokenizer and chat template, as plain files.

Files of a Hugging Face folder are copied as they are, so that this package never needs a class for
them (transformers 5 names one that 4 does not know). A GGUF file only carries vocabulary, merges
and the name of a pre-tokenizer; what transformers makes of it is corrected here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from generator_svc.export.checkpoint.checkpoint import quiet_libraries
from generator_svc.export.checkpoint.files import SLOW_TOKENIZER_FILES, TOKENIZER_FILE
from generator_svc.export.checkpoint.source import Source
from generator_svc.export.errors import ExportError

COPIED = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# What transformers raises for files that are missing, damaged or not what it expects.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def write_tokenizer(source: Source, folder: Path) -> None:
    """Puts tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`."""
    if source.kind == "gguf":
        _convert_gguf(source.path, folder)
    elif (source.path / TOKENIZER_FILE).is_file():
        _copy(source.path, folder)
    else:
        _convert_slow(source, folder)
    _check(source, folder)
    _extract_chat_template(folder)


def encode(folder: Path, text: str) -> list[int]:
    """Token ids of plain text, without any the tokenizer would add."""
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
    """A folder with, say, only a sentencepiece model."""
    if not any((source.path / name).is_file() for name in SLOW_TOKENIZER_FILES):
        raise ExportError(
            f"{source.label}: has no tokenizer: neither {TOKENIZER_FILE} nor what it could be made "
            f"from ({', '.join(SLOW_TOKENIZER_FILES)})"
        )
    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(source.path)
    except _UNREADABLE as error:
        raise _no_tokenizer(source.label, error) from error
    _save(tokenizer, folder)


def _no_tokenizer(label: str, error: Exception) -> ExportError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ExportError(f"{label}: no tokenizer that can be read: {reason}")


def _save(tokenizer: Any, folder: Path) -> None:
    if not tokenizer.is_fast:
        raise ExportError("the tokenizer has no tokenizer.json form")
    scratch = folder / ".tokenizer"
    tokenizer.save_pretrained(scratch)
    _copy(scratch, folder)
    shutil.rmtree(scratch)


def _check(source: Source, folder: Path) -> None:
    """Raises ExportError if what was copied cannot be read."""
    try:
        json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{source.label}: tokenizer_config.json is not JSON: {error}") from None
    try:
        Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as error:  # the library has no other
        raise ExportError(f"{source.label}: {TOKENIZER_FILE} cannot be read: {error}") from error


def _extract_chat_template(folder: Path) -> None:
    """Old checkpoints keep the template within tokenizer_config.json, alone or with others."""
    if (folder / "chat_template.jinja").is_file():
        return
    template = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _convert_gguf(path: Path, folder: Path) -> None:
    metadata = gguf_metadata(path)
    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except _UNREADABLE as error:
        raise _no_tokenizer(str(path), error) from error
    _save(tokenizer, folder)
    file = folder / TOKENIZER_FILE
    content = json.loads(file.read_text(encoding="utf-8"))
    tokens = {entry["id"]: entry["content"] for entry in content["added_tokens"]}
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        _restore_byte_level(content, metadata, path)
        _write_json(file, content)
    _restore_special_tokens(folder, metadata, tokens)


def gguf_metadata(path: Path) -> dict[str, Any]:
    """The scalar fields of a GGUF file's header."""
    reader = GGUFReader(path)
    return {
        name: field.contents()
        for name, field in reader.fields.items()
        if name.startswith("tokenizer.") and len(field.data) <= 1
    }


def _restore_byte_level(content: dict[str, Any], metadata: dict[str, Any], path: Path) -> None:
    """Gives a byte-level BPE the pre-tokenizer it was trained with, and nothing sentencepiece.

    transformers gives every GGUF vocabulary GPT-2's splitting and a sentencepiece decoder, and adds
    a BOS token that the checkpoint never had.
    """
    kind = metadata.get("tokenizer.ggml.pre", "default")
    content["pre_tokenizer"] = _pre_tokenizer(kind, path)
    content["decoder"] = _byte_level(use_regex=True)
    content["normalizer"] = {"type": "NFC"} if kind == "qwen2" else None
    content["model"] |= {"byte_fallback": False, "fuse_unk": False, "unk_token": None}
    if not metadata.get("tokenizer.ggml.add_bos_token", False):
        content["post_processor"] = None


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _pre_tokenizer(kind: str, path: Path) -> dict[str, Any]:
    if kind in ("default", "gpt-2"):
        return _byte_level(use_regex=True)
    if kind in ("smollm", "starcoder", "refact", "command-r"):
        first: dict[str, Any] = {"type": "Digits", "individual_digits": True}
        return {"type": "Sequence", "pretokenizers": [first, _byte_level(use_regex=True)]}
    splits = {"llama-bpe": LLAMA3_SPLIT, "qwen2": QWEN2_SPLIT}
    if kind not in splits:
        raise ExportError(
            f"{path.name}: its pre-tokenizer {kind!r} is not known; "
            "export from the Hugging Face folder instead"
        )
    pattern = {"Regex": splits[kind]}
    first = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [first, _byte_level(use_regex=False)]}


def _restore_special_tokens(folder: Path, metadata: dict[str, Any], tokens: dict[int, str]) -> None:
    """Names BOS, EOS, UNK and padding by the ids in the GGUF header."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special: dict[str, str] = {}
    for role, field in names.items():
        token = tokens.get(metadata.get(f"tokenizer.ggml.{field}_token_id", -1))
        config[f"{role}_token"] = token
        config.pop(f"{role}_token_id", None)
        if token is not None:
            special[f"{role}_token"] = token
    config["add_bos_token"] = bool(metadata.get("tokenizer.ggml.add_bos_token", False))
    config["clean_up_tokenization_spaces"] = False
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("legacy", "model_type", "use_default_system_prompt", "add_prefix_space"):
        config.pop(key, None)
    _write_json(file, config)
    _write_json(folder / "special_tokens_map.json", special)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
