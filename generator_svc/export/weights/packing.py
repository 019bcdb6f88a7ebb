"""How the initializers of a graph are made of slices of a checkpoint, when the graph is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

Array = np.ndarray[Any, Any]


@dataclass
class Packed:
    """One initializer to be written; `data_type` is a TensorProto.DataType.

    Slices follow each other along its first axis or, if it `is_transposed` (two axes only), are
    the transposed slices that follow each other along its second.
    """

    name: str
    dims: tuple[int, ...]
    data_type: int
    is_transposed: bool = False

    def proto(self) -> TensorProto:
        """The initializer without its bytes, which no message ever holds."""
        tensor = TensorProto(name=self.name, dims=self.dims, data_type=self.data_type)
        tensor.data_location = TensorProto.EXTERNAL
        return tensor

    @property
    def elements(self) -> int:
        return math.prod(self.dims)


@dataclass(frozen=True)
class Packing:
    """Initializers that come out of one pass over the same weights.

    `slices()` begins the pass: each item holds the next slice of every output, in their order.
    Floats may come as float32 whatever the output's type: they are converted (and clipped to
    float16's range) as they are written.
    """

    outputs: tuple[Packed, ...]
    slices: Callable[[], Iterator[tuple[Array, ...]]]
