"""MXFP4 weights as stored by gpt-oss, and the forms that ONNX Runtime's QMoE takes.

A block is 32 consecutive columns of a row: 16 bytes of two 4-bit floats (e2m1, even columns in the
low nibbles) and one byte for their scale, 2**(byte - 127) (e8m0). See the OCP Microscaling Formats
specification 1.0. Every e2m1 value is half an integer, so int8 with half the scale is exact.
"""

from __future__ import annotations

import numpy as np

from generator_svc.export.errors import ExportError
from generator_svc.export.weights.matrix import Array

BLOCK_SIZE = 32
ZERO_POINT = 128
NOT_A_NUMBER = 255  # the scale byte that means NaN

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)

# Decodes both values of a byte at once, as one element of twice the size, which is faster.
_BYTES = np.arange(256)
_PAIRS = np.stack([_VALUES[_BYTES & 15], _VALUES[_BYTES >> 4]], -1)
_FLOAT_PAIRS = _PAIRS.view(np.float64)[:, 0]
_INTEGER_PAIRS = (2 * _PAIRS + ZERO_POINT).astype(np.uint8).view(np.uint16)[:, 0]

# Exponent bytes whose scales each type represents exactly, as normal or subnormal numbers.
FLOAT32_EXPONENTS = range(NOT_A_NUMBER)
FLOAT16_EXPONENTS = range(127 - 24, 127 + 15 + 1)


def as_float(blocks: Array, scales: Array) -> Array:
    """Dequantises uint8 [..., blocks, 16] and [..., blocks] to float32 [..., columns]."""
    values = np.take(_FLOAT_PAIRS, blocks).view(np.float32)
    values *= np.ldexp(np.float32(1), scales.astype(np.int32) - 127)[..., None]
    return values.reshape(*scales.shape[:-1], -1)


def as_int8(blocks: Array, scales: Array) -> tuple[Array, Array]:
    """The same values in the form (q - 128) * scale.

    q is uint8 [..., columns]; the scales are float32 [..., blocks], half of MXFP4's.
    """
    quantized = np.take(_INTEGER_PAIRS, blocks).view(np.uint8)
    halves = np.ldexp(np.float32(1), scales.astype(np.int32) - 128)
    return quantized.reshape(*scales.shape[:-1], -1), halves


def as_fp4(blocks: Array) -> Array:
    """The codes as QMoE takes them with quant_type "fp4".

    From uint8 [..., rows, blocks, 16] to [..., columns, rows / 2], even rows in the low nibbles.
    The scales stay the same.
    """
    rows = blocks.reshape(*blocks.shape[:-2], -1)
    low, high = rows[..., 0::2, :], rows[..., 1::2, :]
    even = (low & 15) | (high << 4)
    odd = (low >> 4) | (high & 0xF0)
    columns = np.stack([even, odd], -1).reshape(*even.shape[:-1], -1)
    return np.ascontiguousarray(columns.swapaxes(-1, -2))


def scale_by_power(
    name: str, blocks: Array, scales: Array, exponent: int, allowed: range = FLOAT32_EXPONENTS
) -> Array:
    """The scales of the weights multiplied by 2**exponent, which must be `allowed`.

    Blocks of zeros may have any scale: theirs is clipped to those allowed. For other blocks, raises
    ExportError naming the tensor.
    """
    moved = scales.astype(np.int16) + exponent
    outside = (moved < allowed.start) | (moved >= allowed.stop) | (scales == NOT_A_NUMBER)
    if outside.any():
        # A nibble without its sign bit: -0 is a zero too.
        is_used = (blocks & 0x77).any(-1) & outside
        if is_used.any():
            byte = int(scales[is_used][0])
            raise ExportError(
                f"{name}_scales: exponent byte {byte} cannot be represented exactly (allowed: "
                f"{allowed.start - exponent} to {allowed.stop - 1 - exponent})"
            )
        moved = np.clip(moved, allowed.start, allowed.stop - 1)
    return moved.astype(np.uint8)
