"""Four bits per weight: a k-quant with integer zero points, in the layout of MatMulNBits.

As in llama.cpp's k-quants, several ranges around that of the block are tried, and the error of a
weight x is weighted by |x| + rms(block) (`make_qkx2_quants` in
https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c). Those fit a scale and an
arbitrary offset to each candidate. MatMulNBits only has zero points from 0 to 15, and if the best
fit's offset is rounded to one afterwards, as ONNX Runtime's `quant_tensor_k_quant_cpu` does, the
error is larger than without any search. So here every candidate has an integer zero point z from
the start:

- x is v steps from zero, v = round(x / step), clipped to -z and 15 - z;
- the best scale is p / q, where p = sum(w x v), q = sum(w v²) and w is the weight of x's error;
- its error is sum(w x²) - p² / q, so the largest p² / q wins, and errors are never computed.

Symmetric blocks have fewer candidates. If the activations of each column are known, w is their mean
square instead, since a product's error is its weights' errors times its input. That gains more than
is lost without zero points (docs/log.md).

Blocks whose weights are already at most 16 evenly spaced levels around zero, as in a GGUF file in
Q4_0, are reproduced exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from generator_svc.export.weights.blocks import BLOCK_SIZE, cut
from generator_svc.export.weights.matrix import Array
from trivium.host_limits import cpu_limit

ZERO_POINT = 8  # the default of MatMulNBits
TOP = np.float32(15)  # levels are 0 to 15
# Numbers of steps that a block's range, including zero, is divided into. With more than 15 its ends
# are clipped. Fewer than 13 are best only for a block with that few levels; Q4_0 has at least 8.
STEPS = [*range(8, 13), *(13 + number / 4 for number in range(17))]
# Numbers of steps from the zero point down to the largest magnitude of a symmetric block.
SYMMETRIC_STEPS = [7 + number / 4 for number in range(9)]
# Further ones, which clip it more, may be best if its column has small activations.
MEASURED_STEPS = [*SYMMETRIC_STEPS, 9.5, 10, 11, 12]
# Minimum importance of a column, relative to the mean, for columns without activations in
# calibration.
MIN_IMPORTANCE = 1e-4
# Blocks that are processed at once, so that the arrays of a tile stay in a core's own cache. All
# tiles have this size, so a block's sums do not depend on its position.
TILE = 2048

# Steps per unit and zero point of the next candidate of each block, float32 [b] both.
_Candidates = Iterator[tuple[Array, Array]]


def quantize_asymmetric(rows: Array) -> tuple[Array, Array, Array]:
    """Quantises float32 rows [n, K] in blocks with a zero point each, on all cores.

    A weight is scale * (level - zero point). Returns levels as uint8 [n, blocks, 16], two per byte
    with the first in the low nibble; float32 scales [n, blocks]; and zero points as uint8
    [n, ceil(blocks / 2)], packed in the same way row by row.
    """
    packed, scales, zero_points = _quantize(rows, _ranges)
    odd = zero_points.shape[1] % 2
    zero_points = np.pad(zero_points, ((0, 0), (0, odd)), constant_values=ZERO_POINT)
    return packed, scales, zero_points[:, 0::2] | zero_points[:, 1::2] << 4


def quantize_symmetric(
    rows: Array, is_half: bool = False, mean_squares: Array | None = None
) -> tuple[Array, Array]:
    """Quantises float32 rows [n, K] in blocks with zero point 8, on all cores.

    Returns levels and scales as `quantize_asymmetric` does; with `is_half`, float16 represents the
    scales exactly. If the weight with the largest magnitude is positive, the scale is negative, so
    that its level is below 8. `mean_squares`, float32 [K], are those of the product's input.
    """
    if mean_squares is None:
        packed, scales, _ = _quantize(rows, partial(_magnitudes, SYMMETRIC_STEPS), is_half)
        return packed, scales
    mean = float(mean_squares.mean())
    importance = mean_squares / mean if mean > 0 else np.ones_like(mean_squares)
    importance = np.maximum(importance, MIN_IMPORTANCE)[None].astype(np.float32)
    search = partial(_magnitudes, MEASURED_STEPS)
    packed, scales, _ = _quantize(rows, search, is_half, cut(importance)[0])
    return packed, scales


def _ranges(weights: Array) -> _Candidates:
    low = np.minimum(weights.min(0), 0)
    width = np.maximum(weights.max(0), 0) - low
    width[width == 0] = 1
    for steps in STEPS:
        per_unit = np.float32(steps) / width
        yield per_unit, np.clip(np.rint(-low * per_unit), 0, TOP)


def _magnitudes(all_steps: list[float], weights: Array) -> _Candidates:
    low, high = weights.min(0), weights.max(0)
    largest = np.where(high > -low, high, low)
    largest[largest == 0] = 1
    zero_point = np.full_like(largest, ZERO_POINT)
    for steps in all_steps:
        yield np.float32(-steps) / largest, zero_point


def _quantize(
    rows: Array,
    candidates: Callable[[Array], _Candidates],
    is_half: bool = False,
    importance: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Levels [n, blocks, 16], two per byte, and scales and zero points [n, blocks].

    `importance`, float32 [blocks, 32], weights the errors of each column.
    """
    blocks = cut(rows)
    count, per_row, _ = blocks.shape
    flat = blocks.reshape(-1, BLOCK_SIZE)
    packed = np.empty((len(flat), BLOCK_SIZE // 2), np.uint8)
    scales = np.empty(len(flat), np.float32)
    zero_points = np.empty(len(flat), np.uint8)

    def work(start: int) -> None:
        tile = slice(start, start + TILE)
        counts = None
        if importance is not None:
            counts = importance[np.arange(start, start + TILE) % per_row].T
        found = _quantize_tile(flat[tile], candidates, is_half, counts)
        packed[tile], scales[tile], zero_points[tile] = found

    with ThreadPoolExecutor(cpu_limit().cores) as pool:
        list(pool.map(work, range(0, len(flat), TILE)))
    return (
        packed.reshape(count, per_row, -1),
        scales.reshape(count, per_row),
        zero_points.reshape(count, per_row),
    )


def _quantize_tile(
    blocks: Array,
    candidates: Callable[[Array], _Candidates],
    is_half: bool,
    importance: Array | None,
) -> tuple[Array, Array, Array]:
    """Levels [b, 16], scales [b] and zero points [b] of at most `TILE` blocks [b, 32].

    Internally blocks are columns, so that sums over all blocks run along contiguous memory.
    """
    columns = np.zeros((BLOCK_SIZE, TILE), np.float32)
    columns[:, : len(blocks)] = blocks.T
    # Squares of very large or small weights exceed float32. Powers of two scale without rounding.
    unit = np.ldexp(np.float32(1), np.frexp(np.abs(columns).max(0))[1] - 1)
    columns /= unit
    scale, zero_point = _best(columns, candidates(columns), importance)
    if is_half:
        with np.errstate(over="ignore"):
            scale = _as_half(scale * unit) / unit
    columns /= scale
    columns += zero_point
    levels = np.clip(np.rint(columns), 0, TOP).astype(np.uint8)
    packed = levels[0::2] | levels[1::2] << 4
    count = len(blocks)
    return packed.T[:count], (scale * unit)[:count], zero_point[:count].astype(np.uint8)


def _best(weights: Array, candidates: _Candidates, importance: Array | None) -> tuple[Array, Array]:
    """The best scale and zero point of each column of float32 [32, b], float32 [b] both.

    `importance`, float32 [32, b], weights the error of each element.
    """
    if importance is None:
        importance = np.abs(weights)
        importance += np.sqrt(np.einsum("ij,ij->j", weights, weights) / BLOCK_SIZE)
    weighted = importance * weights
    levels = np.empty_like(weights)  # counted from the zero point
    gain = np.full_like(weights[0], -1)  # below any actual gain
    scale, zero_point = np.empty_like(gain), np.empty_like(gain)
    for per_unit, zero in candidates:
        np.multiply(weights, per_unit, out=levels)
        np.rint(levels, out=levels)
        np.maximum(levels, -zero, out=levels)  # np.clip is slow when its bounds are arrays
        np.minimum(levels, TOP - zero, out=levels)
        product = np.einsum("ij,ij->j", weighted, levels)
        square = np.einsum("ij,ij,ij->j", importance, levels, levels)
        # In a block of zeros all levels are zero, and any scale fits.
        fitted = np.divide(product, square, out=np.ones_like(product), where=square > 0)
        better = fitted * product > gain
        np.copyto(gain, fitted * product, where=better)
        np.copyto(scale, fitted, where=better)
        np.copyto(zero_point, zero, where=better)
    return scale, zero_point


def _as_half(scales: Array) -> Array:
    """Scales rounded to float16, returned as float32; nonzero scales stay nonzero.

    Levels are chosen for these scales: below 6e-5 float16 has few digits left, and rounding a scale
    after its levels were chosen would shift every weight of the block.
    """
    limits = np.finfo(np.float16)
    rounded = np.clip(scales, limits.min, limits.max).astype(np.float16).astype(np.float32)
    least = np.copysign(np.float32(limits.smallest_subnormal), scales)
    return np.where((rounded == 0) & (scales != 0), least, rounded)
