"""Eight bits per weight, in the layout of MatMulNBits."""

from __future__ import annotations

import numpy as np
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
)

from generator_svc.export.weights.blocks import BLOCK_SIZE, cut
from generator_svc.export.weights.matrix import Array

ZERO_POINT = 128  # the default of MatMulNBits
LARGEST = np.float32(127)
_LARGEST_HALF = np.finfo(np.float16).max


def quantize_asymmetric(rows: Array) -> tuple[Array, Array, Array]:
    """Quantises float32 rows [n, K] in blocks with a zero point each, by round to nearest.

    A weight is scale * (level - zero point). Returns levels as uint8 [n, blocks, 32], float32
    scales [n, blocks] and zero points as uint8 [n, blocks].
    """
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK_SIZE, is_symmetric=False, bits=8)
    # ONNX Runtime ignores strides, so the transpose has to be contiguous.
    columns = np.ascontiguousarray(rows.T)
    levels, scales, zero_points = DefaultWeightOnlyQuantizer(config).qbits_block_quant(columns)
    return levels, scales, zero_points


def quantize_symmetric(rows: Array, is_half: bool = False) -> tuple[Array, Array]:
    """Quantises float32 rows [n, K] in blocks with zero point 128 and a largest magnitude of 127.

    Returns levels as uint8 [n, blocks, 32] and float32 scales [n, blocks]; with `is_half`, float16
    represents them exactly.
    """
    blocks = cut(rows)
    scales = np.abs(blocks).max(-1) / LARGEST
    if is_half:  # before choosing levels; rounded up, so that the largest weight is not clipped
        halves = np.minimum(scales, _LARGEST_HALF).astype(np.float16)
        halves = np.where(halves < scales, np.nextafter(halves, _LARGEST_HALF), halves)
        scales = halves.astype(np.float32)
    levels = np.rint(blocks / np.where(scales == 0, 1, scales)[..., None])
    return (np.clip(levels, -LARGEST, LARGEST) + ZERO_POINT).astype(np.uint8), scales
