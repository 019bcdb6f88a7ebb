"""The tensors of a checkpoint by name, read in slices, and as a whole only if they are small."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Protocol

from generator_svc.export.checkpoint.gguf_file import open_gguf
from generator_svc.export.checkpoint.safetensors_folder import open_safetensors
from generator_svc.export.checkpoint.source import Source
from generator_svc.export.weights.matrix import Array, Matrix

# Checkpoints up to this size in float32 are kept in memory.
MAX_KEPT_BYTES = 2**30


class Tensors(Protocol):
    """Names and shapes are those of the Hugging Face checkpoint, whatever the file format.

    If a tensor is missing or cannot be read, raises ExportError naming the tensor and its file.
    """

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def file(self, name: str) -> Path:
        """The file that holds the tensor, for error messages."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows start to stop along the first axis: floats as float32, other types as they are.

        The caller may modify the array. Nothing else stays in memory after reading, not even pages
        of mapped files.
        """
        ...


def open_tensors(source: Source) -> Tensors:
    """The tensors of a checkpoint on disk; raises ExportError if its files are incomplete."""
    tensors = open_gguf(source.path) if source.kind == "gguf" else open_safetensors(source.path)
    elements = sum(prod(tensors.shape(name)) for name in tensors.names())
    return KeptInMemory(tensors) if 4 * elements <= MAX_KEPT_BYTES else tensors


class KeptInMemory:
    """Reads each tensor once and keeps it: for small checkpoints that are read again and again."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._kept: dict[str, Array] = {}

    def names(self) -> Iterable[str]:
        return self._tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(name)

    def file(self, name: str) -> Path:
        return self._tensors.file(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        if name not in self._kept:
            self._kept[name] = self._tensors.read(name)
        return self._kept[name][start:stop].copy()


def matrix(tensors: Tensors, name: str) -> Matrix:
    """The two-dimensional tensor `name`."""
    rows, columns = tensors.shape(name)
    return Matrix(rows, columns, lambda start, stop: tensors.read(name, start, stop))
