"""The matrices of a layer's experts, read one expert at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from generator_svc.export.checkpoint import mxfp4
from generator_svc.export.checkpoint.tensors import Tensors
from generator_svc.export.errors import ExportError
from generator_svc.export.weights.matrix import Array


@dataclass(frozen=True)
class ExpertMatrices:
    """One projection of every expert, with a bias; rows are outputs.

    `name` is `model.layers.N.mlp.experts.gate_up_proj`, whose rows alternate between gate and up,
    or `….down_proj`. Stored as MXFP4, or as floats [experts, columns, rows]. Values that are read
    are multiplied by 2**exponent.
    """

    tensors: Tensors
    name: str
    is_mxfp4: bool
    count: int
    rows: int
    columns: int
    exponent: int = 0

    def check(self) -> None:
        """Raises ExportError naming the tensor if one is missing or has the wrong shape."""
        if self.is_mxfp4:
            blocks = (self.count, self.rows, self.columns // mxfp4.BLOCK_SIZE)
            expected = {"_blocks": (*blocks, mxfp4.BLOCK_SIZE // 2), "_scales": blocks}
        else:
            expected = {"": (self.count, self.columns, self.rows)}
        expected["_bias"] = (self.count, self.rows)
        for suffix, shape in expected.items():
            found = self.tensors.shape(self.name + suffix)
            if found != shape:
                raise ExportError(f"{self.name}{suffix} is {list(found)} instead of {list(shape)}")

    def mxfp4(self, expert: int, allowed: range = mxfp4.FLOAT32_EXPONENTS) -> tuple[Array, Array]:
        """Blocks uint8 [rows, blocks, 16] and scales uint8 [rows, blocks]; only if `is_mxfp4`.

        Raises ExportError if a scale is not among the `allowed` exponent bytes.
        """
        blocks, scales = (
            self.tensors.read(self.name + suffix, expert, expert + 1)[0]
            for suffix in ("_blocks", "_scales")
        )
        return blocks, mxfp4.scale_by_power(self.name, blocks, scales, self.exponent, allowed)

    def floats(self, expert: int) -> Array:
        """The weights of one expert, float32 [rows, columns]."""
        if self.is_mxfp4:
            return mxfp4.as_float(*self.mxfp4(expert))
        values = self.tensors.read(self.name, expert, expert + 1)[0].T
        return np.ascontiguousarray(values) * np.float32(2.0**self.exponent)

    def bias(self) -> Array:
        """The biases of all experts, float32 [experts, rows]."""
        return self.tensors.read(f"{self.name}_bias") * np.float32(2.0**self.exponent)
