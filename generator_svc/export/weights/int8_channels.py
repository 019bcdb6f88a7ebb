"""Eight bits per weight with one scale per output channel, for integer products."""

from __future__ import annotations

import numpy as np

from generator_svc.export.weights.matrix import Array

LARGEST = np.float32(127)


def quantize(rows: Array) -> tuple[Array, Array]:
    """Symmetric int8 [n, K] and float32 scales [n] for float32 rows [n, K].

    MatMulInteger and similar operators take the int8 matrix transposed.
    """
    scales = np.abs(rows).max(1) / LARGEST
    scales[scales == 0] = 1
    return np.rint(rows / scales[:, None]).astype(np.int8), scales
