"""Quantised slices of rows, compared with ONNX Runtime's own quantisers and kernels."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

from generator_svc.export.weights import int4, int8, int8_channels

BLOCK = 32
LARGEST = float(np.finfo(np.float32).max)


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def heavy_tailed(shape):
    return np.random.default_rng(1).standard_t(2, shape).astype(np.float32)


def mixed(shape):
    """Rows scaled from 1e-6 to 1e6, one of zeros, one constant, one positive, one negative."""
    rows = normal(shape) * np.logspace(-6, 6, shape[0], dtype=np.float32)[:, None]
    rows[0] = 0
    rows[1] = -0.3
    rows[2] = np.abs(rows[2])
    rows[3] = -np.abs(rows[3])
    return rows


WEIGHTS = {
    "normal": normal((24, 256)),
    "heavy-tailed": heavy_tailed((24, 256)),
    "mixed": mixed((24, 256)),
    "bfloat16": (normal((24, 256)).view(np.uint32) & 0xFFFF0000).view(np.float32),
    "odd number of blocks": normal((24, 96)),
    "one block": normal((24, 32)),
    "part of a block": normal((24, 100)),
    "less than a block": normal((24, 7)),
}
EXTREMES = {
    "zeros": np.zeros((3, 64), np.float32),
    "constant": np.repeat(np.float32([[0.3], [-7], [1e-3]]), 64, axis=1),
    "almost constant": 1 + normal((3, 64)) / 100,
    "positive": np.random.default_rng(3).uniform(0.5, 1, (3, 64)).astype(np.float32),
    "negative": -np.random.default_rng(3).uniform(0.5, 1, (3, 64)).astype(np.float32),
    "tiny": normal((3, 64)) * np.float32(1e-33),
    "subnormal": normal((3, 64)) * np.float32(1e-41),
    "huge": normal((3, 64)) * np.float32(1e37),
    "largest": np.where(normal((3, 64)) > 0, LARGEST, -LARGEST).astype(np.float32),
    "one weight": np.eye(3, 64, dtype=np.float32),
    "an outlier": np.where(np.eye(3, 64) > 0, np.float32(1e6), normal((3, 64))),
}


def by_input(rows):
    """Quantises with mean squares of the product's input, which differ by column."""
    return int4.quantize_symmetric(rows, True, input_squares(rows.shape[1]))


def input_squares(columns):
    return np.random.default_rng(4).lognormal(sigma=3, size=columns).astype(np.float32)


QUANTIZERS = {
    "int4 asymmetric": int4.quantize_asymmetric,
    "int4 symmetric": int4.quantize_symmetric,
    "int4 symmetric by input": by_input,
    "int8 asymmetric": int8.quantize_asymmetric,
    "int8 symmetric": int8.quantize_symmetric,
    "int8 channels": int8_channels.quantize,
}


def halves(packed):
    """Each byte's lower half, then its upper half."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def restored(packed, scales, zero_points=None, *, columns):
    """The weights [n, columns], in float64."""
    levels = packed.astype(np.float64) if packed.shape[-1] == BLOCK else halves(packed)
    if zero_points is None:
        zero_points = np.full(scales.shape, 128 if packed.shape[-1] == BLOCK else 8)
    elif packed.shape[-1] != BLOCK:
        zero_points = halves(zero_points)[:, : scales.shape[1]]
    blocks = (levels.astype(np.float64) - zero_points[..., None]) * scales.astype(np.float64)[
        ..., None
    ]
    return blocks.reshape(len(packed), -1)[:, :columns]


def model(nodes, initializers, columns, rows):
    """x float32 [m, columns] to y float32 [m, rows]."""
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", size])
        for name, size in (("x", columns), ("y", rows))
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in initializers.items()]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(proto, x):
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def by_onnx_runtime(weight, config):
    """ONNX Runtime's quantiser on a product with weight [n, K]: packed, scales, zero points."""
    rows, columns = weight.shape
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    proto = model([node], {"w": np.ascontiguousarray(weight.T)}, columns, rows)
    quantizer = MatMulNBitsQuantizer(proto, bits=4, block_size=BLOCK, algo_config=config)
    quantizer.process()
    tensors = {item.name: item for item in quantizer.model.model.graph.initializer}
    (node,) = quantizer.model.model.graph.node
    return [numpy_helper.to_array(tensors[name]) for name in node.input[1:]]


def importance(weight):
    """How much each weight's error counts, in float64 blocks [blocks, 32], padded."""
    blocks = np.pad(weight.astype(np.float64), ((0, 0), (0, -weight.shape[1] % BLOCK)))
    blocks = blocks.reshape(-1, BLOCK)
    return np.abs(blocks) + np.sqrt((blocks**2).mean(1, keepdims=True))


def weighted_error(weight, got):
    """The weighted sum of squared errors of each block."""
    padding = ((0, 0), (0, -weight.shape[1] % BLOCK))
    error = np.pad(weight.astype(np.float64) - got, padding).reshape(-1, BLOCK)
    return (importance(weight) * error**2).sum(1)


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
def test_slices_equal_the_whole_tensor(quantize, weight):
    """Bit for bit, wherever the weight is split."""
    whole = quantize(weight)

    slices = [quantize(weight[start:stop]) for start, stop in ((0, 1), (1, 8), (8, 24))]

    for got, expected in zip(zip(*slices, strict=True), whole, strict=True):
        np.testing.assert_array_equal(np.concatenate(got), expected)


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
def test_many_rows_are_each_quantised_by_themselves(quantize):
    """With more blocks than are processed at once, the last batch of them incomplete."""
    weight = normal((800, 96))

    whole = quantize(weight)

    for got, expected in zip(quantize(weight[700:]), whole, strict=True):
        np.testing.assert_array_equal(got, expected[700:])


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize(
    ("bits", "kind"),
    [
        (4, "asymmetric"),
        (4, "symmetric"),
        (4, "symmetric by input"),
        (8, "asymmetric"),
        (8, "symmetric"),
    ],
)
def test_blocks_have_the_layout_of_matmul_n_bits(weight, bits, kind):
    rows, columns = weight.shape
    inputs = QUANTIZERS[f"int{bits} {kind}"](weight)
    names = ["packed", "scales", "zero_points"][: len(inputs)]
    node = helper.make_node(
        "MatMulNBits", ["x", *names], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=bits, block_size=BLOCK,
    )  # fmt: skip
    x = normal((5, columns), seed=2)

    proto = model([node], dict(zip(names, inputs, strict=True)), columns, rows)
    got = run(proto, x)

    expected = x @ restored(*inputs, columns=columns).T
    size = np.abs(x) @ np.abs(weight.T)
    np.testing.assert_array_less(np.abs(got - expected), 1e-5 * size + 1e-30)


def test_padding_of_zero_points_is_the_default_one():
    """An odd number of blocks leaves half a byte at the end of each row."""
    _, scales, zero_points = int4.quantize_asymmetric(normal((24, 96)))

    assert (24, 3) == scales.shape
    assert (24, 2) == zero_points.shape
    assert {8} == set((zero_points[:, 1] >> 4).tolist())


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_int8_equals_onnx_runtime(weight):
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, bits=8)

    for got, expected in zip(
        int8.quantize_asymmetric(weight), by_onnx_runtime(weight, config), strict=True
    ):
        np.testing.assert_array_equal(got.ravel(), expected.ravel())


@pytest.mark.parametrize(
    ("quantize", "weight", "at_most"),
    [
        (int4.quantize_asymmetric, normal((64, 1024)), 0.86),
        (int4.quantize_asymmetric, heavy_tailed((64, 1024)), 0.95),
        (int4.quantize_asymmetric, np.abs(normal((64, 1024))), 0.8),
        (int4.quantize_symmetric, normal((64, 1024)), 0.96),
    ],
    ids=["normal", "heavy-tailed", "positive", "symmetric"],
)
def test_int4_loses_less_than_onnx_runtimes(quantize, weight, at_most):
    """Compared with its k-quant, which is asymmetric."""
    theirs = by_onnx_runtime(weight, KQuantWeightOnlyQuantConfig())

    lost = weighted_error(weight, restored(*quantize(weight), columns=1024)).sum()

    reference = weighted_error(weight, restored(*theirs, columns=1024)).sum()
    assert lost < at_most * reference


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_int4_equals_the_best_of_an_exhaustive_search(weight):
    """Over all steps from much too small to much too large and all zero points, block by block."""
    columns = weight.shape[1]
    got = weighted_error(weight, restored(*int4.quantize_asymmetric(weight), columns=columns))

    blocks = np.pad(weight.astype(np.float64), ((0, 0), (0, -columns % BLOCK))).reshape(-1, BLOCK)
    best = np.array([_least_error(*pair) for pair in zip(blocks, importance(weight), strict=True)])
    size = (importance(weight) * blocks**2).sum(1)
    assert (got >= best * (1 - 1e-3) - 1e-9 * size).all()  # otherwise the search is not exhaustive
    assert got.sum() <= 1.05 * best.sum() + 1e-9 * size.sum()
    assert np.median(got - best - 1e-9 * size) <= 0.05 * np.median(best)


def _least_error(block, weights):
    width = max(block.max(), 0) - min(block.min(), 0)
    if width == 0:
        return 0
    steps = np.linspace(6, 24, 181)[:, None, None] / width
    zero = np.arange(16)[:, None]
    levels = np.clip(np.rint(block * steps), -zero, 15 - zero)
    product, square = (weights * block * levels).sum(-1), (weights * levels**2).sum(-1)
    scale = product / np.where(square == 0, 1, square)
    scale[scale == 0] = 1
    levels = np.clip(np.rint(block / scale[..., None]), -zero, 15 - zero)
    return (weights * (levels * scale[..., None] - block) ** 2).sum(-1).min()


def test_activation_weights_reduce_the_output_error():
    """Their error is a third smaller than if only the weights' own error is minimized."""
    weight, squares = normal((64, 1024)), input_squares(1024)
    x = normal((200, 1024), seed=5) * np.sqrt(squares)
    off = {}
    for name, inputs in {
        "asymmetric": int4.quantize_asymmetric(weight),
        "symmetric": int4.quantize_symmetric(weight),
        "by input": by_input(weight),
    }.items():
        off[name] = np.square(x @ (restored(*inputs, columns=1024) - weight).T).mean()

    assert off["by input"] < 0.67 * off["asymmetric"]
    assert off["by input"] < 0.6 * off["symmetric"]


@pytest.mark.parametrize("squares", [np.zeros(64), np.repeat([0, 1], 32)], ids=["all", "a block"])
def test_columns_without_activations_keep_their_weights(squares):
    """Other texts may activate columns that the calibration text does not."""
    weight = normal((16, 64))
    inputs = int4.quantize_symmetric(weight, True, squares.astype(np.float32))

    off = np.abs(restored(*inputs, columns=64) - weight)
    assert off.max() < np.abs(weight).max() / 3
    assert np.square(off).mean() < 0.012 * np.square(weight).mean()


@pytest.mark.parametrize("factor", [1, 2.0**-11, 1e-5, 1e-9, 1e9])
@pytest.mark.parametrize(
    ("quantize", "at_most"),
    [
        (int8.quantize_symmetric, 0.0066),
        (int4.quantize_symmetric, 0.093),
    ],
)
def test_scales_are_rounded_before_levels_are_chosen(quantize, at_most, factor):
    """They are exact in float16; where it has few digits left, little is lost."""
    weight = normal((64, 256)) * np.float32(factor)

    packed, scales = quantize(weight, True)

    with np.errstate(over="raise"):
        assert (scales.astype(np.float16).astype(np.float32) == scales).all()
    off = restored(packed, scales, columns=256) - weight
    if 1e-7 < factor < 1e8:  # at 1e-5 scales are a few of float16's smallest steps
        assert np.linalg.norm(off) < at_most * np.linalg.norm(weight)
    else:
        assert np.abs(off).max() <= np.abs(weight).max()


@pytest.mark.parametrize("weight", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize(
    ("quantize", "levels"),
    [
        (int4.quantize_asymmetric, 13),
        (int4.quantize_symmetric, 7),
        (int8.quantize_symmetric, 127),
    ],
)
def test_extreme_blocks_stay_within_a_step(quantize, levels, weight):
    """No weight is off by more than its block's range divided by the levels."""
    got = restored(*quantize(weight), columns=64)

    blocks = weight.astype(np.float64).reshape(3, 2, BLOCK)
    if quantize is int4.quantize_asymmetric:
        width = np.maximum(blocks.max(-1), 0) - np.minimum(blocks.min(-1), 0)
    else:
        width = np.abs(blocks).max(-1)
    off = np.abs(got.reshape(blocks.shape) - blocks).max(-1)
    np.testing.assert_array_less(off, width / levels + 1e-43)


@pytest.mark.parametrize("quantize", [int4.quantize_asymmetric, int4.quantize_symmetric])
def test_four_bits_reproduce_q4_0(quantize):
    """Blocks that already have 16 levels around zero, one of them -8, as in GGUF files."""
    generator = np.random.default_rng(0)
    levels = np.rint(generator.standard_normal((64, 4, BLOCK)) * 2).clip(-8, 7)
    levels[..., 5] = -8
    scales = generator.uniform(-0.1, 0.1, (64, 4, 1)).astype(np.float16)
    weight = (levels * scales).reshape(64, 128).astype(np.float32)

    got = restored(*quantize(weight), columns=128)

    np.testing.assert_allclose(got, weight, rtol=1e-5)


def test_constant_blocks_are_exact():
    weight = np.repeat(np.float32([[0.3], [-7], [1e-3], [0]]), 64, axis=1)

    got = restored(*int4.quantize_asymmetric(weight), columns=64)

    np.testing.assert_allclose(got, weight, rtol=1e-6)


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_channels_have_their_largest_weight_at_127(weight):
    levels, scales = int8_channels.quantize(weight)

    assert np.int8 == levels.dtype
    assert np.float32 == scales.dtype
    largest = np.abs(weight).max(1)
    assert (np.where(largest > 0, 127, 0) == np.abs(levels.astype(int)).max(1)).all()
    off = np.abs(levels * scales.astype(np.float64)[:, None] - weight).max(1)
    assert (off <= 0.5001 * largest / 127).all()
