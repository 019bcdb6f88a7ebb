"""Eight bits per weight with one scale per output channel, for products of integers."""

from __future__ import annotations

import numpy as np

from generator_svc.export.weights.matrix import Array

LARGEST = np.float32(127)


def quantize(rows: Array) -> tuple[Array, Array]:
    """Symmetric int8 [n, K] and float32 scales [n] of float32 rows [n, K].

    MatMulInteger and its kin take the int8 transposed.
    """
    scales = np.abs(rows).max(1) / LARGEST
    scales[scales == 0] = 1
    return np.rint(rows / scales[:, None]).astype(np.int8), scales
