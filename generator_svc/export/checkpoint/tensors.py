"""The tensors of a checkpoint by name, read in slices and never whole unless they are small."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from generator_svc.export.checkpoint.safetensors_folder import open_safetensors
from generator_svc.export.checkpoint.source import Source
from generator_svc.export.weights.matrix import Array, Matrix


class Tensors(Protocol):
    """Names and shapes are those of the Hugging Face checkpoint, whatever the files are.

    What cannot be read, or is not there, is an ExportError that names the tensor and its file.
    """

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def file(self, name: str) -> Path:
        """Where the tensor is, for messages about it."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows start to stop along the first axis: float32 for any type of floats, else as it is.

        The memory that reading took is given back, pages of mapped files included.
        """
        ...


def open_tensors(source: Source) -> Tensors:
    """The tensors of a checkpoint on the disk; raises ExportError for files that are not whole."""
    return open_safetensors(source.path)


def matrix(tensors: Tensors, name: str) -> Matrix:
    """The two-dimensional tensor `name`."""
    rows, columns = tensors.shape(name)
    return Matrix(rows, columns, lambda start, stop: tensors.read(name, start, stop))
