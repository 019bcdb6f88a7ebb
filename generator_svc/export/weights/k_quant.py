"""Four bits per weight: a k-quant for whole zero points, in the layout of MatMulNBits.

As in the k-quants of llama.cpp, each block tries several ranges around its own, and the error of a
weight x counts |x| + rms(block) times (`make_qkx2_quants` in
https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c). Those fit a scale and a
free offset to each candidate. MatMulNBits has only zero points from 0 to 15, and when the offset
of the best fit is rounded to one afterwards, as ONNX Runtime's `quant_tensor_k_quant_cpu` does, the
result is worse than without any search. So here every candidate has a whole zero point z from the
start:

- x is v steps from zero, v = round(x / step), clipped to -z and 15 - z;
- the scale that fits best is p / q, where p = sum(w x v) and q = sum(w v²);
- its error is sum(w x²) - p² / q, so the largest p² / q wins, and no candidate is written out.

Zero is in the range of each block. Blocks that have 16 or fewer evenly spaced levels around zero
already, as in a GGUF file of Q4_0, come back exactly.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from generator_svc.export.weights.blocks import BLOCK_SIZE, Array, cut
from trivium.host_limits import cpu_limit

TOP = np.float32(15)  # levels are 0 to 15
# Steps that a block's range is divided into. With more than 15 its ends are cut off. Fewer than 13
# are best only for blocks that have that many levels; one end of a block of Q4_0 is 8 from zero.
STEPS = [*range(8, 13), *(13 + number / 5 for number in range(21))]
UNUSED_ZERO_POINT = 8
# Blocks that are worked on at once, so that the arrays of a tile stay in a core's own cache. All
# tiles are of this size, so a block's sums do not depend on where it stands.
TILE = 2048


def quantize(rows: Array) -> tuple[Array, Array, Array]:
    """Asymmetric 4-bit blocks of float32 rows [n, K], on all cores.

    A weight is scale * (level - zero point). Returns levels as uint8 [n, blocks, 16], the first of
    two in the lower half of a byte; float32 scales [n, blocks]; and zero points as uint8
    [n, ceil(blocks / 2)], packed in the same way row by row.
    """
    blocks = cut(rows)
    count, per_row, _ = blocks.shape
    flat = blocks.reshape(-1, BLOCK_SIZE)
    packed = np.empty((len(flat), BLOCK_SIZE // 2), np.uint8)
    scales = np.empty(len(flat), np.float32)
    zero_points = np.empty(len(flat), np.uint8)

    def work(start: int) -> None:
        tile = slice(start, start + TILE)
        packed[tile], scales[tile], zero_points[tile] = _quantize_tile(flat[tile])

    with ThreadPoolExecutor(cpu_limit().cores) as pool:
        list(pool.map(work, range(0, len(flat), TILE)))
    return (
        packed.reshape(count, per_row, -1),
        scales.reshape(count, per_row),
        _pack_zero_points(zero_points.reshape(count, per_row)),
    )


def _pack_zero_points(zero_points: Array) -> Array:
    odd = zero_points.shape[1] % 2
    padded = np.pad(zero_points, ((0, 0), (0, odd)), constant_values=UNUSED_ZERO_POINT)
    return padded[:, 0::2] | padded[:, 1::2] << 4


def _quantize_tile(blocks: Array) -> tuple[Array, Array, Array]:
    """Levels [b, 16], scales [b] and zero points [b] (one a byte) of at most `TILE` blocks [b, 32].

    Inside, blocks are columns, so that sums over a block run along contiguous memory.
    """
    columns = np.zeros((BLOCK_SIZE, TILE), np.float32)
    columns[:, : len(blocks)] = blocks.T
    # Squares of very large or small weights have no float32. A power of two rounds nothing.
    unit = np.ldexp(np.float32(1), np.frexp(np.abs(columns).max(0))[1] - 1)
    columns /= unit
    scale, zero_point = _search(columns)
    columns /= scale
    columns += zero_point
    levels = np.clip(np.rint(columns), 0, TOP).astype(np.uint8)
    packed = levels[0::2] | levels[1::2] << 4
    count = len(blocks)
    return packed.T[:count], (scale * unit)[:count], zero_point[:count].astype(np.uint8)


def _search(weights: Array) -> tuple[Array, Array]:
    """The scales and zero points (as floats) of columns [32, b], float32 [b]."""
    importance = np.abs(weights)
    importance += np.sqrt(_dot(weights, weights) / BLOCK_SIZE)
    weighted = importance * weights
    low = np.minimum(weights.min(0), 0)
    width = np.maximum(weights.max(0), 0) - low
    width[width == 0] = 1  # a block of zeros, which gains nothing below
    gain, scale, zero_point = (np.zeros_like(width), np.ones_like(width), np.zeros_like(width))
    levels = np.empty_like(weights)
    for steps in STEPS:
        per_unit = np.float32(steps) / width
        zero = np.clip(np.rint(-low * per_unit), 0, TOP)
        np.multiply(weights, per_unit, out=levels)
        np.rint(levels, out=levels)
        np.clip(levels, -zero, TOP - zero, out=levels)
        product = _dot(weighted, levels)
        square = np.einsum("ij,ij,ij->j", importance, levels, levels)
        fitted = product / np.where(square == 0, 1, square)
        better = fitted * product > gain
        np.copyto(gain, fitted * product, where=better)
        np.copyto(scale, fitted, where=better)
        np.copyto(zero_point, zero, where=better)
    return scale, zero_point


def _dot(left: Array, right: Array) -> Array:
    return np.asarray(np.einsum("ij,ij->j", left, right))
