"""The safetensors files of a Hugging Face folder: a single one, or shards with an index."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from generator_svc.export.checkpoint.file_tensors import (
    FileTensor,
    FileTensors,
    decode_bfloat16,
    decode_numbers,
)
from generator_svc.export.checkpoint.files import INDEX_FILE, WEIGHTS_FILE
from generator_svc.export.errors import ExportError

# Data types of the format: bytes per element, and how to decode them.
TYPES = {
    "BF16": (2, decode_bfloat16),
    "F16": (2, decode_numbers("<f2")),
    "F32": (4, decode_numbers("<f4")),
    "F64": (8, decode_numbers("<f8")),
    "U8": (1, decode_numbers("u1")),
    "I8": (1, decode_numbers("i1")),
    "I32": (4, decode_numbers("<i4")),
    "I64": (8, decode_numbers("<i8")),
    "BOOL": (1, decode_numbers("?")),
}


def open_safetensors(folder: Path) -> FileTensors:
    """The checkpoint in `folder`. All files are checked at once, except for their weights' values.

    Raises ExportError if a file is missing, truncated or damaged, a tensor is not where the index
    says, or a data type is not supported.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return FileTensors(folder / WEIGHTS_FILE, _read_header(folder / WEIGHTS_FILE))
    if not (folder / INDEX_FILE).is_file():
        raise ExportError(f"{folder}: contains neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    shard_of = _read_index(folder / INDEX_FILE)
    headers = {}
    for shard in sorted(set(shard_of.values())):
        if not (folder / shard).is_file():
            raise ExportError(f"{folder / shard}: is missing, but listed in {INDEX_FILE}")
        headers[shard] = _read_header(folder / shard)
    for name, shard in shard_of.items():
        if name not in headers[shard]:
            raise ExportError(
                f"{folder / shard}: has no tensor {name!r}, although {INDEX_FILE} lists it there"
            )
    return FileTensors(
        folder / INDEX_FILE, {name: headers[shard][name] for name, shard in shard_of.items()}
    )


def _read_index(path: Path) -> dict[str, str]:
    """The shard of each tensor, by name."""
    try:
        shard_of = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(shard, str) for shard in shard_of.values()):
            raise TypeError("weight_map must map tensors to file names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{path}: not an index of safetensors files: {error!r}") from error
    return dict(shard_of)


def _read_header(path: Path) -> dict[str, FileTensor]:
    """The tensors of one file; safetensors checks the header against the size of the file."""
    try:
        with safe_open(path, framework="numpy"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise ExportError(f"{path}: truncated or not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    return {name: _tensor(path, name, 8 + size, entry) for name, entry in header.items()}


def _tensor(path: Path, name: str, start: int, entry: dict[str, Any]) -> FileTensor:
    if entry["dtype"] not in TYPES:
        raise ExportError(
            f"{path}: tensor {name!r} is {entry['dtype']}, which is not supported "
            f"(supported: {', '.join(TYPES)})"
        )
    size, decode = TYPES[entry["dtype"]]
    shape = tuple(entry["shape"])
    return FileTensor(path, start + entry["data_offsets"][0], shape, size * prod(shape[1:]), decode)
