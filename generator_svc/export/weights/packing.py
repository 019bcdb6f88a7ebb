"""How a graph's initializers are made from slices of a checkpoint when the graph is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from generator_svc.export.weights.matrix import Array, Matrix

MAX_HALF = float(np.finfo(np.float16).max)


@dataclass
class Packed:
    """One initializer to be written; `data_type` is a TensorProto.DataType.

    Slices are concatenated along the first axis or, if it `is_transposed` (two axes only),
    transposed and concatenated along the second.
    """

    name: str
    dims: tuple[int, ...]
    data_type: int
    is_transposed: bool = False

    def proto(self) -> TensorProto:
        """The initializer without its data, which never is in a protobuf message."""
        tensor = TensorProto(name=self.name, dims=self.dims, data_type=self.data_type)
        tensor.data_location = TensorProto.EXTERNAL
        return tensor

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type in the file; uint8 for FLOAT8E8M0, which NumPy lacks."""
        if self.data_type == TensorProto.FLOAT8E8M0:
            return np.dtype(np.uint8)
        kind: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(self.data_type)
        return kind

    @property
    def nbytes(self) -> int:
        return math.prod(self.dims) * self.dtype.itemsize


@dataclass(frozen=True)
class Packing:
    """Initializers that are made in one pass over the same weights.

    Each of `slices` makes the next slice of every output, in order; they may be called from several
    threads. Floats may be float32 whatever the output's type: they are converted (and clipped to
    float16's range) when they are written.
    """

    outputs: tuple[Packed, ...]
    slices: Sequence[Callable[[], tuple[Array, ...]]]


def pack_matrix(
    outputs: tuple[Packed, ...], matrix: Matrix, pack: Callable[[Array], tuple[Array, ...]]
) -> Packing:
    """A Packing of `matrix`: `pack` makes n rows of every output from float32 [n, columns]."""

    def slice_of(read: Callable[[], Array]) -> Callable[[], tuple[Array, ...]]:
        return lambda: pack(read())

    return Packing(outputs, [slice_of(read) for read in matrix.slices()])
