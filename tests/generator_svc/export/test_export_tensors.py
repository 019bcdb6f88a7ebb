"""The tensors of a checkpoint: values, slices, what is refused, and how much memory they take."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from generator_svc.export import ExportError
from generator_svc.export.checkpoint.checkpoint import load_checkpoint
from generator_svc.export.checkpoint.gguf_file import open_gguf
from generator_svc.export.checkpoint.safetensors_folder import open_safetensors
from generator_svc.export.checkpoint.source import Source, locate
from generator_svc.export.checkpoint.tensors import KeptInMemory, Tensors, open_tensors
from tests.tiny_models import LLAMA3_SCALING
from trivium.embedded_model import EMBEDDED_MODEL

INDEX = "model.safetensors.index.json"


def random_tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def write_shards(folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> Path:
    """A folder with one file for each of `shards`, and their index."""
    folder.mkdir(exist_ok=True)
    for file, tensors in shards.items():
        save_file(dict(tensors), folder / file)
    shard_of = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return folder


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    return write_shards(
        tmp_path / "checkpoint",
        {
            "one.safetensors": {"embed": random_tensor(50, 16), "norm": random_tensor(16)},
            "two.safetensors": {"head": random_tensor(50, 16)},
        },
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_floats_are_read_as_float32(tmp_path, dtype):
    """Each float type is converted as by PyTorch, bit for bit, including subnormal numbers."""
    special = [0.0, -0.0, 1e-40, 65504.0]
    values = torch.cat([torch.tensor(special).double(), torch.randn(60).double()])
    save_file({"weight": values.reshape(8, 8).to(dtype)}, tmp_path / "model.safetensors")

    read = open_safetensors(tmp_path).read("weight")

    expected = values.reshape(8, 8).to(dtype).float().numpy()
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinite_weights_are_refused(tmp_path, dtype, value):
    """As after training that diverged: every answer would be noise."""
    good, bad = torch.full((4, 8), 60000.0), torch.zeros(4, 8)
    bad[3, 7] = value
    save_file({"good": good.to(dtype), "bad": bad.to(dtype)}, tmp_path / "model.safetensors")
    tensors = open_safetensors(tmp_path)

    assert (tensors.read("good") > 0).all()
    assert (tensors.read("bad", 0, 3) == 0).all()
    with pytest.raises(ExportError, match=r"model\.safetensors: tensor 'bad' has NaN or infinite"):
        tensors.read("bad")


def test_largest_finite_weights_are_accepted(tmp_path):
    """Although their sum overflows."""
    largest = torch.full((4, 8), torch.finfo(torch.float32).max)
    save_file({"weight": largest}, tmp_path / "model.safetensors")

    np.testing.assert_array_equal(open_safetensors(tmp_path).read("weight"), largest.numpy())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64])
def test_integers_are_read_as_they_are(tmp_path, dtype):
    """Packed weights and their scales are bytes that must not be converted."""
    values = torch.arange(-60, 60).to(dtype).reshape(2, 3, 4, 5)
    save_file({"blocks": values}, tmp_path / "model.safetensors")

    tensors = open_safetensors(tmp_path)

    assert tensors.shape("blocks") == (2, 3, 4, 5)
    np.testing.assert_array_equal(tensors.read("blocks"), values.numpy())
    np.testing.assert_array_equal(tensors.read("blocks", 1, 2), values[1:2].numpy())
    assert tensors.read("blocks").dtype == values.numpy().dtype


def test_tensors_of_all_shards_are_one_checkpoint(two_shards):
    """Names and shapes come from all shards, and each tensor knows its file."""
    tensors = open_safetensors(two_shards)

    shapes = {name: tensors.shape(name) for name in tensors.names()}
    assert shapes == {"embed": (50, 16), "norm": (16,), "head": (50, 16)}
    assert tensors.file("head") == two_shards / "two.safetensors"
    assert check_slices(tensors, "embed", random_tensor(50, 16).float().numpy())
    assert check_slices(tensors, "norm", random_tensor(16).float().numpy())


def check_slices(tensors: Tensors, name: str, expected: np.ndarray) -> bool:
    """Each slice equals that of the whole tensor, and the caller may write to it."""
    rows = len(expected)
    for start in range(0, rows, 1 + rows // 20):
        for stop in (start + 1, (start + 1 + rows) // 2, rows, None):
            read = tensors.read(name, start, stop)
            np.testing.assert_array_equal(read, expected[start:stop])
            read[...] = 7.0
    return True


def test_small_checkpoints_are_kept_in_memory(two_shards):
    """A checkpoint of less than 1 GiB is read from disk once."""
    tensors = open_tensors(Source("test", "folder", two_shards))
    tensors.read("embed", 3, 4)
    for file in two_shards.iterdir():
        file.unlink()

    assert isinstance(tensors, KeptInMemory)
    assert {"embed", "norm", "head"} == set(tensors.names())
    assert tensors.shape("embed") == (50, 16)
    assert tensors.file("embed") == two_shards / "one.safetensors"
    assert check_slices(tensors, "embed", random_tensor(50, 16).float().numpy())


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "two.safetensors").unlink(), "two.safetensors: is missing, but listed"),
        (
            lambda f: damage(f / "two.safetensors", lambda b: b[:-1]),
            "two.safetensors: truncated or not a safetensors file",
        ),
        (
            lambda f: damage(f / "two.safetensors", lambda b: b[:8] + b"]" + b[9:]),
            "two.safetensors: truncated or not a safetensors file",
        ),
        (
            lambda f: damage(f / "two.safetensors", lambda _: b"version https://git-lfs"),
            "two.safetensors: truncated or not a safetensors file",
        ),
        (
            lambda f: (f / "two.safetensors").write_bytes(b""),
            "two.safetensors: truncated or not a safetensors file",
        ),
        (
            lambda f: save_file({"other": random_tensor(2, 2)}, f / "two.safetensors"),
            "two.safetensors: has no tensor 'head'",
        ),
        (
            lambda f: save_file(
                {"head": random_tensor(2, 2).to(torch.float8_e4m3fn)}, f / "two.safetensors"
            ),
            "two.safetensors: tensor 'head' is F8_E4M3, which is not supported",
        ),
        (lambda f: (f / INDEX).write_text("{"), f"{INDEX}: not an index"),
        (lambda f: (f / INDEX).write_text("[]"), f"{INDEX}: not an index"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'), f"{INDEX}: not an index"),
        (lambda f: (f / INDEX).unlink(), "contains neither model.safetensors nor"),
    ],
)
def test_a_bad_folder_is_refused_before_anything_is_read(two_shards, change, message):
    """One line names the file, and the tensor if one is the reason."""
    change(two_shards)

    with pytest.raises(ExportError, match=message) as caught:
        open_safetensors(two_shards)

    assert str(two_shards) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_tensor_is_named(two_shards):
    """The message has the tensor's name and the file that was searched."""
    tensors = open_safetensors(two_shards)

    for use in (tensors.shape, tensors.read, tensors.file):
        with pytest.raises(ExportError, match=f"{INDEX}: has no tensor 'lm_head.weight'"):
            use("lm_head.weight")


def test_file_that_shrinks_while_it_is_read_is_detected(tmp_path):
    """No rows are made up if the file has fewer bytes than the header promised."""
    file = tmp_path / "model.safetensors"
    save_file({"weight": random_tensor(8, 8)}, file)
    tensors = open_safetensors(tmp_path)
    damage(file, lambda b: b[:-1])

    with pytest.raises(ExportError, match=r"model.safetensors: truncated within tensor 'weight'"):
        tensors.read("weight", 4)

    file.unlink()
    with pytest.raises(ExportError, match=r"model.safetensors: tensor 'weight' cannot be read"):
        tensors.read("weight")


READ_ALL = """
import re, sys
from pathlib import Path
from generator_svc.export.checkpoint.source import Source
from generator_svc.export.checkpoint.tensors import matrix, open_tensors

def peak():  # ru_maxrss of a child starts with what its parent had
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

before = peak()
path = Path(sys.argv[1])
tensors = open_tensors(Source("test", "gguf" if path.is_file() else "folder", path))
rows = sum(len(read()) for name in tensors.names() for read in matrix(tensors, name).slices())
print(rows, peak() - before)
"""


def read_all(path: Path) -> tuple[int, int]:
    """Reads a checkpoint in slices in another process; its rows, and bytes of memory growth."""
    command = [sys.executable, "-c", READ_ALL, str(path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows, grown = output.split()
    return int(rows), int(grown)


def test_reading_frees_memory(tmp_path):
    """A folder of 1 GiB is read in slices while the process grows by less than 200 MB."""
    rows = 2**15
    for shard in range(4):
        weights = {f"weight.{shard}": torch.zeros(rows, 2**12, dtype=torch.bfloat16)}
        save_file(weights, tmp_path / f"{shard}.safetensors")
    weight_map = {f"weight.{shard}": f"{shard}.safetensors" for shard in range(4)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    read, grown = read_all(tmp_path)

    assert read == 4 * rows
    assert grown < 200 * 10**6


# Two layers, and rows of 256 so that blocks of all quantisations fit.
GGUF_SHAPE = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
GGUF_FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": False},
    # transformers uses 128 for this family, whatever the file says.
    "qwen3": {"tie_word_embeddings": True, "head_dim": 128},
}
# Types that the gguf package can write; for the others, random bytes are used.
QUANTISED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
RANDOM_BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ1_M")


def encode(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Blocks of `kind`; scales in random blocks are finite, wherever they are."""
    if kind.name in QUANTISED:
        return gguf.quantize(values, kind)
    shape = gguf.quant_shape_to_byte_shape(values.shape, kind)
    return np.random.default_rng(0).integers(0, 0x78, shape, dtype=np.uint8)


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """Permutes rows as llama.cpp does for Llama's queries and keys."""
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def random_weights(family: str, **settings: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Configuration and weights of a model of `family`, as in a checkpoint."""
    config = AutoConfig.for_model(family, **GGUF_SHAPE | GGUF_FAMILIES[family] | settings)
    weights = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    # In a new model norms are ones and biases zeros, which would not show a wrong order.
    random = np.random.default_rng(0)
    return config, {
        name: random.standard_normal(tensor.shape, np.float32) for name, tensor in weights.items()
    }


def write_gguf(path: Path, family: str = "llama", kind: str = "F32", **changes: Any) -> Path:
    """A random model of `family`, its matrices in `kind`, as llama.cpp's converter writes it."""
    config, weights = random_weights(family, **changes.get("settings", {}))
    architecture = "llama" if family == "mistral" else family
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, changes.get("architecture", architecture))
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(changes.get("head_count_kv", config.num_key_value_heads))
    writer.add_rope_dimension_count(64)
    writer.add_uint16("split.count", changes.get("parts", 0))
    for name, values in weights.items():
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            is_query = ".q_proj." in name
            values = permute(
                values, config.num_attention_heads if is_query else config.num_key_value_heads
            )
        dtype = GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        base, suffix = name.rsplit(".", 1)
        writer.add_tensor(
            f"{names.get_name(base)}.{suffix}", encode(values, dtype), raw_dtype=dtype
        )
    if (scaling := changes.get("rope_scaling")) is not None:
        writer.add_string(f"{architecture}.rope.scaling.type", scaling)
    if (divisors := changes.get("rope_freqs")) is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    for name, (values, dtype) in changes.get("more", {}).items():
        writer.add_tensor(name, values, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def loaded_by_transformers(path: Path) -> dict[str, np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def check_equal(tensors: Tensors, expected: Mapping[str, np.ndarray]) -> None:
    assert sorted(tensors.names()) == sorted(expected)
    for name, values in expected.items():
        read = tensors.read(name)
        assert tensors.shape(name) == values.shape
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read.view(np.uint32), values.view(np.uint32), name)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "Q8_0") for family in GGUF_FAMILIES if family != "llama"),
        *(("llama", kind) for kind in (*QUANTISED, *RANDOM_BLOCKS)),
    ],
)
def test_gguf_weights_are_those_that_transformers_loads(tmp_path, family, kind):
    """Names, shapes and every bit of every weight are equal; slices too, with and without heads."""
    path = write_gguf(tmp_path / "model.gguf", family, kind)

    tensors, expected = open_gguf(path), loaded_by_transformers(path)

    check_equal(tensors, expected)
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        assert check_slices(tensors, name, expected[name])


@pytest.mark.slow
def test_the_embedded_model_is_what_transformers_loads():
    """The file that the default export reads."""
    source = locate(EMBEDDED_MODEL)

    check_equal(open_tensors(source), loaded_by_transformers(source.path))


def test_llama_cpp_permutation_is_undone(tmp_path):
    """Rows of queries and keys, and their biases, are as they were before the conversion."""
    settings = {"attention_bias": True}
    path = write_gguf(tmp_path / "model.gguf", settings=settings)
    _, weights = random_weights("llama", **settings)

    tensors = open_gguf(path)

    check_equal(tensors, weights)
    for name in ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"):
        assert check_slices(tensors, f"model.layers.0.{name}", weights[f"model.layers.0.{name}"])


def test_the_rope_scaling_of_llama_3_1_is_read_from_a_gguf_file(tmp_path):
    """There it is only stored as divisors of the frequencies, which transformers ignores."""
    config, _ = random_weights("llama")
    plain = LlamaRotaryEmbedding(config).inv_freq
    config.rope_scaling = LLAMA3_SCALING | {"original_max_position_embeddings": 64}
    config.max_position_embeddings = 512
    scaled = LlamaRotaryEmbedding(config).inv_freq
    path = write_gguf(tmp_path / "model.gguf", rope_freqs=(plain / scaled).numpy())

    decoder = load_checkpoint(Source("m", "gguf", path)).decoder

    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), scaled)
    assert not torch.equal(plain, scaled)
    np.testing.assert_allclose(decoder.cos, angles.cos(), atol=1e-4)


@pytest.mark.parametrize("count", [1, 3, 64])
def test_divisors_of_another_head_size_are_refused(tmp_path, count):
    """One line names the tensor, its shape and the expected shape."""
    path = write_gguf(tmp_path / "model.gguf", rope_freqs=np.ones(count, np.float32))

    with pytest.raises(ExportError) as caught:
        load_checkpoint(Source("m", "gguf", path))

    message = rf"{path}: rope_freqs.weight has shape \[{count}\], but its metadata implies \[\d+\]"
    assert re.fullmatch(message, str(caught.value))


ONE_TENSOR = (np.zeros((4, 32), np.float32), GGMLQuantizationType.F32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma2"}, "architecture 'gemma2' is not supported"),
        ({"parts": 3}, "is one of 3 parts; merge them"),
        ({"rope_scaling": "yarn"}, "rope scaling 'yarn' is not supported in GGUF files"),
        ({"head_count_kv": [1, 2]}, "llama.attention.head_count must be the same"),
        ({"head_count_kv": 3}, "tensor 'blk.0.attn_k.weight' has 128 rows for 3 heads"),
        (
            {"more": {"blk.0.ffn_gate_exps.weight": ONE_TENSOR}},
            "tensor 'blk.0.ffn_gate_exps.weight' is not supported",
        ),
        (
            {"more": {"output.weight": (np.zeros((4, 32), np.int32), GGMLQuantizationType.I32)}},
            "tensor 'output.weight' is I32, which is not supported",
        ),
    ],
)
def test_unsupported_gguf_file_is_refused(tmp_path, changes, message):
    """One line names the file and what is not supported."""
    path = write_gguf(tmp_path / "model.gguf", **changes)

    with pytest.raises(ExportError, match=message) as caught:
        open_gguf(path)

    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data[:1000],
        lambda data: data[:20],
        lambda data: b"",
        lambda data: b"version https://git-lfs.github.com/spec/v1",
        lambda data: data[:8] + b"\xff" * 16 + data[24:],
    ],
)
def test_a_damaged_gguf_file_is_refused_before_anything_is_read(tmp_path, change):
    """Whatever part is missing, the message is one line and names the file."""
    path = write_gguf(tmp_path / "model.gguf")
    damage(path, change)

    with pytest.raises(ExportError, match=r"truncated, damaged or not a GGUF file") as caught:
        open_gguf(path)

    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reading_a_gguf_file_frees_memory(tmp_path):
    """A file of 430 MB is read in slices while the process grows by less than 200 MB."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    kind = GGMLQuantizationType.Q8_0
    shape = (2**15, 2**12)
    blocks = np.zeros(gguf.quant_shape_to_byte_shape(shape, kind), np.uint8)
    for layer in range(3):
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    read, grown = read_all(tmp_path / "model.gguf")

    assert read == 3 * shape[0]
    assert grown < 200 * 10**6
