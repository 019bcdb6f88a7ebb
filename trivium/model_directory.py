"""A folder that holds one model, as the tokenizer, the generator and the command line see it.

The layout is that of onnxruntime-genai's model builder. This module parses the small JSON files,
and takes only sizes and digests of the others; it knows nothing about tokens or runtimes, and
imports only the standard library. A folder made by `generator_svc.export` also has a manifest with
the size and the digest of every file, so a truncated copy is refused, and altered bytes cause a
warning; for other folders only existence can be checked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trivium.file_digest import FileDigest, digest_files

log = logging.getLogger(__name__)

GENAI_CONFIG = "genai_config.json"
GENERATION_CONFIG = "generation_config.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
MANIFEST = "trivium_export.json"

# How a graph's protobuf names a file with tensors: an entry of two fields, the key `location` and
# the path, relative to the graph's folder and of less than 128 bytes.
_LOCATION = re.compile(rb"\x0a\x08location\x12([\x01-\x7f])", re.DOTALL)


class ModelDirectoryError(ValueError):
    """The folder is not a usable model; the one-line message says which file and why."""


@dataclass(frozen=True)
class GraphNames:
    """Names of the decoder's inputs and outputs; the cache names hold one `%d` for the layer."""

    input_ids: str = "input_ids"
    attention_mask: str = "attention_mask"
    past_key: str = "past_key_values.%d.key"
    past_value: str = "past_key_values.%d.value"
    logits: str = "logits"
    present_key: str = "present.%d.key"
    present_value: str = "present.%d.value"


@dataclass(frozen=True)
class ModelDirectory:
    """A checked model folder.

    `revision` is a digest (32 hex digits) of every byte of tokenizer, configuration, graph and
    weights, wherever the folder is: two services with equal revisions agree on token ids and
    logits. `weights` are the files of the graph's external data.
    """

    path: Path
    id: str
    revision: str
    graph: Path
    weights: tuple[Path, ...]
    num_layers: int
    num_kv_heads: int
    head_size: int
    context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    family: str
    precision: str | None
    names: GraphNames
    generation_config: dict[str, Any] = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)

    @property
    def weight_bytes(self) -> int:
        """Size of the graph and its external data, which is about the size of the weights."""
        return sum(file.stat().st_size for file in (self.graph, *self.weights))

    @property
    def tokenizer(self) -> Path:
        """The file `tokenizer.json`; it exists."""
        return self.path / TOKENIZER

    @property
    def tokenizer_config(self) -> Path:
        """The file `tokenizer_config.json`; it exists."""
        return self.path / TOKENIZER_CONFIG

    @property
    def chat_template(self) -> Path | None:
        """The file `chat_template.jinja`; if None, the template may be in tokenizer_config.json."""
        path = self.path / CHAT_TEMPLATE
        return path if path.is_file() else None

    @property
    def has_chat_template(self) -> bool:
        """A base model has none, and serves plain completions only."""
        config = _read_json(self.tokenizer_config)
        return self.chat_template is not None or config.get("chat_template") is not None


def load_model_directory(path: str | Path) -> ModelDirectory:
    """Reads and checks the folder at `path`; raises ModelDirectoryError if it is not usable."""
    try:
        return _load(Path(path).expanduser().absolute())
    except (OSError, RuntimeError) as error:  # RuntimeError: a home folder that is unknown
        raise ModelDirectoryError(f"{path}: {error}") from error


def _load(folder: Path) -> ModelDirectory:
    _check_folder(folder)
    manifest = _read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    _check_sizes(folder, manifest)
    for name in (GENAI_CONFIG, TOKENIZER, TOKENIZER_CONFIG):
        _check_file(folder / name)
    model = _Section(folder / GENAI_CONFIG, _read_json(folder / GENAI_CONFIG)).section("model")
    decoder = model.section("decoder")
    graph = folder / str(decoder.value("filename"))
    _check_file(graph)
    weights = _weights(graph)
    files = [folder / TOKENIZER, folder / GENAI_CONFIG, graph, *weights]
    revision = _revision(folder, files, manifest)
    generation_config = (
        _read_json(folder / GENERATION_CONFIG) if (folder / GENERATION_CONFIG).is_file() else {}
    )
    vocab_size = model.count("vocab_size")
    return ModelDirectory(
        path=folder,
        id=folder.name,
        revision=revision,
        graph=graph,
        weights=weights,
        num_layers=decoder.count("num_hidden_layers"),
        num_kv_heads=decoder.count("num_key_value_heads"),
        head_size=decoder.count("head_size"),
        context_length=model.count("context_length"),
        vocab_size=vocab_size,
        eos_token_ids=model.token_ids("eos_token_id", vocab_size),
        family=str(model.values.get("type", "")),
        precision=manifest.get("precision"),
        names=_graph_names(decoder),
        generation_config=generation_config,
        manifest=manifest,
    )


@dataclass(frozen=True)
class _Section:
    """One JSON object of the configuration, with its file for error messages."""

    file: Path
    values: dict[str, Any]

    def value(self, key: str) -> Any:
        if key not in self.values:
            raise ModelDirectoryError(f"{self.file}: {key!r} is missing")
        return self.values[key]

    def section(self, key: str) -> _Section:
        value = self.value(key)
        if not isinstance(value, dict):
            raise ModelDirectoryError(f"{self.file}: {key!r} is not an object")
        return _Section(self.file, value)

    def count(self, key: str) -> int:
        value = self.value(key)
        if type(value) is not int or value < 1:
            raise ModelDirectoryError(f"{self.file}: {key!r} is not a positive integer")
        return value

    def name(self, key: str, standard: str) -> str:
        """A name of the graph; with one `%d`, for the layer, if the standard name has it."""
        value = self.values.get(key, standard)
        if not isinstance(value, str):
            raise ModelDirectoryError(f"{self.file}: {key!r} is not a string")
        if "%d" in standard and (value.count("%"), value.count("%d")) != (1, 1):
            raise ModelDirectoryError(f"{self.file}: {key!r} has no single %d for the layer")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """The ids under `key`, which may be missing, null, one id or a list of ids.

        Ids outside the vocabulary are left out, since the model can never generate them.
        """
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(token) is not int for token in ids):
            raise ModelDirectoryError(f"{self.file}: {key!r} is neither a token id nor a list")
        unknown = [token for token in ids if token >= vocab_size]
        if unknown:
            text = "%s: %r has ids outside the vocabulary of %d tokens, which are ignored: %s"
            log.warning(text, self.file, key, vocab_size, unknown)
        return tuple(token for token in ids if 0 <= token < vocab_size)


def _graph_names(decoder: _Section) -> GraphNames:
    inputs, outputs = decoder.section("inputs"), decoder.section("outputs")
    standard = GraphNames()
    return GraphNames(
        input_ids=inputs.name("input_ids", standard.input_ids),
        attention_mask=inputs.name("attention_mask", standard.attention_mask),
        past_key=inputs.name("past_key_names", standard.past_key),
        past_value=inputs.name("past_value_names", standard.past_value),
        logits=outputs.name("logits", standard.logits),
        present_key=outputs.name("present_key_names", standard.present_key),
        present_value=outputs.name("present_value_names", standard.present_value),
    )


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise ModelDirectoryError(f"{folder}: no such model folder")
    if not folder.is_dir():
        raise ModelDirectoryError(f"{folder}: is a file, not a model folder")
    if not any(folder.iterdir()):
        raise ModelDirectoryError(f"{folder}: the model folder is empty")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ModelDirectoryError(f"{path.parent}: {path.name} is missing")
    if path.stat().st_size == 0:
        raise ModelDirectoryError(f"{path.parent}: {path.name} is empty")


def _check_sizes(folder: Path, manifest: dict[str, Any]) -> None:
    sizes = manifest.get("files", {})
    if not isinstance(sizes, dict):
        raise ModelDirectoryError(f"{folder / MANIFEST}: 'files' is not an object")
    for name, size in sizes.items():
        _check_file(folder / name)
        actual = (folder / name).stat().st_size
        if actual != size:
            raise ModelDirectoryError(
                f"{folder}: {name} has {actual} bytes instead of {size}: truncated or replaced"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelDirectoryError(f"{path.parent}: {path.name} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ModelDirectoryError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelDirectoryError(f"{path}: not a JSON object")
    return value


def _weights(graph: Path) -> tuple[Path, ...]:
    """The existing files of the graph's external data.

    These are the files that the graph names, and those whose names begin with the graph's, as the
    usual ones do: `model.onnx.data` and `model.onnx_data`.
    """
    names = {path.name for path in graph.parent.glob(f"{graph.name}[._]*")}
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for match in _LOCATION.finditer(content):
            name = content[match.end() : match.end() + match[1][0]]
            if b"\0" not in name:
                names.add(os.path.normpath(os.fsdecode(name)))
    return tuple(path for name in sorted(names) if (path := graph.parent / name).is_file())


def _revision(folder: Path, files: list[Path], manifest: dict[str, Any]) -> str:
    """A digest of the files' names and bytes."""
    names = [os.path.relpath(path, folder) for path in files]
    listed = manifest.get("digests")
    listed = listed if isinstance(listed, dict) else {}
    exported = [FileDigest.from_json(listed.get(name)) for name in names]
    whole = hashlib.sha256()
    for name, expected, found in zip(names, exported, digest_files(files, exported), strict=True):
        if expected is not None and expected.sha256 != found.sha256:
            log.warning("%s has changed since the export", folder / name)
        whole.update(f"{name}\0{found.sha256}\0".encode())
    return whole.hexdigest()[:32]
