"""Conversions of MXFP4 weights, compared with transformers and ONNX Runtime's own packer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_state
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from generator_svc.export import ExportError
from generator_svc.export.checkpoint import mxfp4

EXPERTS, ROWS, COLUMNS = 3, 64, 128


@pytest.fixture(scope="module")
def weights():
    """Random blocks [experts, rows, blocks, 16], with every code among them, and scales."""
    random = np.random.default_rng(5)
    blocks = random.integers(0, 256, (EXPERTS, ROWS, COLUMNS // 32, 16), dtype=np.uint8)
    scales = random.integers(104, 143, blocks.shape[:-1], dtype=np.uint8)
    return blocks, scales


def bits(values):
    return np.ascontiguousarray(values, np.float32).view(np.int32)


def in_transformers(blocks, scales):
    """Float32 [experts, rows, columns]."""
    values = convert_moe_packed_tensors(
        torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
    )
    return values.transpose(1, 2).numpy()


def test_floats_are_those_of_transformers(weights):
    """Bitwise, including signs of zeros."""
    expected = in_transformers(*weights)

    np.testing.assert_array_equal(bits(expected), bits(mxfp4.as_float(*weights)))


def test_int8_represents_mxfp4_exactly(weights):
    """Integers times half the scale, which is exact in float16, give the same values."""
    quantized, scales = mxfp4.as_int8(*weights)

    assert (np.uint8, np.float32) == (quantized.dtype, scales.dtype)
    repeated = np.repeat(scales.astype(np.float16).astype(np.float32), 32, -1)
    values = (quantized.astype(np.float32) - 128) * repeated
    np.testing.assert_array_equal(in_transformers(*weights), values)


def test_packed_layout_is_onnx_runtimes(weights):
    """The layout is byte for byte that of its own packer for CUDA."""
    blocks, _ = weights
    packed = mxfp4.as_fp4(blocks)

    assert (EXPERTS, COLUMNS, ROWS // 2) == packed.shape
    for ours, expert in zip(packed, blocks, strict=True):
        theirs = onnxruntime_state.pack_fp4_weights_for_cuda_moe_gemm(
            expert.reshape(ROWS, COLUMNS // 2), ROWS, COLUMNS
        )
        np.testing.assert_array_equal(np.asarray(theirs).view(np.uint8).ravel(), ours.ravel())


def test_scaling_by_a_power_of_two_is_exact(weights):
    """The scaled weights are the weights times 2**-6, exactly."""
    blocks, scales = weights
    scaled = mxfp4.scale_by_power("w", blocks, scales, -6)

    expected = in_transformers(blocks, scales) / 64
    np.testing.assert_array_equal(expected, mxfp4.as_float(blocks, scaled))


@pytest.mark.parametrize(("byte", "exponent"), [(108, -6), (143, 0), (255, 0), (255, -120)])
def test_exponents_that_float16_cannot_hold_are_refused(weights, byte, exponent):
    """One line that names the tensor, and only where the block is not all zeros."""
    blocks, scales = (array.copy() for array in weights)
    scales[:] = 120 - exponent if exponent > -100 else 250
    scales[1, 2, 3] = byte

    with pytest.raises(ExportError, match=f"layers.7.up_scales: exponent byte {byte}"):
        mxfp4.scale_by_power("layers.7.up", blocks, scales, exponent, mxfp4.FLOAT16_EXPONENTS)

    blocks[1, 2, 3] = np.where(np.arange(16) % 2, 0x80, 0x08)  # zeros, some of them negative
    moved = mxfp4.scale_by_power("layers.7.up", blocks, scales, exponent, mxfp4.FLOAT16_EXPONENTS)
    assert moved[1, 2, 3] in mxfp4.FLOAT16_EXPONENTS
    assert not mxfp4.as_float(blocks, moved)[1, 2, 96:].any()


@pytest.mark.parametrize("byte", [103, 142])
def test_smallest_and_largest_float16_scales_are_exact(byte):
    """The smallest and the largest allowed scale are exact in float16."""
    scale = np.float32(2.0) ** (byte - 127)

    assert byte in mxfp4.FLOAT16_EXPONENTS
    assert float(np.float16(scale)) == float(scale)
