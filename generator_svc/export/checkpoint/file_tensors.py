"""Tensors that are stored row by row in files, whatever the file format.

Rows are read into newly allocated memory. Memory-mapping the files would be as fast, but every page
that was read would count as resident until the file is unmapped: 15 GB for a model with 7 billion
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from generator_svc.export.errors import ExportError
from generator_svc.export.weights.matrix import Array


@dataclass(frozen=True)
class FileTensor:
    """Where the bytes of a tensor are and how to decode them.

    `decode` turns bytes [rows, row_bytes] into values [rows, elements of a row]. It gets whole
    groups of `group` rows, which can only be decoded together.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    row_bytes: int
    decode: Callable[[Array], Array]
    group: int = 1


class FileTensors:
    """A checkpoint's tensors by name; for an unknown one, raises ExportError naming `place`."""

    def __init__(self, place: Path, tensors: Mapping[str, FileTensor]) -> None:
        self._place = place
        self._tensors = tensors

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def file(self, name: str) -> Path:
        return self._find(name).file

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        tensor = self._find(name)
        rows = range(tensor.shape[0])[start:stop]
        first = rows.start // tensor.group * tensor.group
        last = -(-rows.stop // tensor.group) * tensor.group
        values = tensor.decode(_read_rows(name, tensor, first, last))
        if values.dtype.kind == "f" and not _is_finite(values):
            raise ExportError(f"{tensor.file}: tensor {name!r} has NaN or infinite values")
        values = values[rows.start - first : rows.stop - first]
        return values.reshape(len(rows), *tensor.shape[1:])

    def _find(self, name: str) -> FileTensor:
        if name not in self._tensors:
            raise ExportError(f"{self._place}: has no tensor {name!r}")
        return self._tensors[name]


def _is_finite(values: Array) -> bool:
    """Usually takes one fast pass, since a sum is finite only if all its terms are."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum()
    return bool(np.isfinite(total) or np.isfinite(values).all())


def decode_bfloat16(raw: Array) -> Array:
    """Decodes bfloat16, the upper half of float32."""
    bits: Array = np.left_shift(raw.view("<u2"), 16, dtype=np.uint32)
    return bits.view(np.float32)


def decode_numbers(dtype: str) -> Callable[[Array], Array]:
    """Decodes a NumPy type: floats become float32, other types stay as they are."""
    is_float = np.dtype(dtype).kind == "f"
    return lambda raw: raw.view(dtype).astype(np.float32 if is_float else dtype, copy=False)


def _read_rows(name: str, tensor: FileTensor, start: int, stop: int) -> Array:
    count = (stop - start) * tensor.row_bytes
    offset = tensor.offset + start * tensor.row_bytes
    try:
        raw = np.fromfile(tensor.file, np.uint8, count, offset=offset)
    except OSError as error:
        raise ExportError(f"{tensor.file}: tensor {name!r} cannot be read: {error}") from error
    if len(raw) < count:
        raise ExportError(f"{tensor.file}: truncated within tensor {name!r}")
    return raw.reshape(stop - start, tensor.row_bytes)
