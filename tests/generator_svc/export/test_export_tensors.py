"""The tensors of a checkpoint: values, slices, what is refused, and how much memory they take."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from generator_svc.export import ExportError
from generator_svc.export.checkpoint.source import Source
from generator_svc.export.checkpoint.tensors import Tensors, open_tensors

INDEX = "model.safetensors.index.json"


def random_tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def write_shards(folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> Source:
    """A folder with one file for each of `shards`, and their index."""
    folder.mkdir(exist_ok=True)
    for file, tensors in shards.items():
        save_file(dict(tensors), folder / file)
    shard_of = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return Source("test", "folder", folder)


@pytest.fixture
def two_shards(tmp_path: Path) -> Source:
    return write_shards(
        tmp_path / "checkpoint",
        {
            "one.safetensors": {"embed": random_tensor(50, 16), "norm": random_tensor(16)},
            "two.safetensors": {"head": random_tensor(50, 16)},
        },
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_floats_are_read_as_float32(tmp_path, dtype):
    """Each type of floats becomes what PyTorch makes of it, bit for bit, NaN and infinity too."""
    special = [0.0, -0.0, 1e-40, 65504.0, float("inf"), float("-inf"), float("nan")]
    values = torch.cat([torch.tensor(special).double(), torch.randn(57).double()])
    save_file({"weight": values.reshape(8, 8).to(dtype)}, tmp_path / "model.safetensors")

    read = open_tensors(Source("test", "folder", tmp_path)).read("weight")

    expected = values.reshape(8, 8).to(dtype).float().numpy()
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64])
def test_integers_are_read_as_they_are(tmp_path, dtype):
    """Packed weights and their scales are bytes, which nothing may convert."""
    values = torch.arange(-60, 60).to(dtype).reshape(2, 3, 4, 5)
    save_file({"blocks": values}, tmp_path / "model.safetensors")

    tensors = open_tensors(Source("test", "folder", tmp_path))

    assert tensors.shape("blocks") == (2, 3, 4, 5)
    np.testing.assert_array_equal(tensors.read("blocks"), values.numpy())
    np.testing.assert_array_equal(tensors.read("blocks", 1, 2), values[1:2].numpy())
    assert tensors.read("blocks").dtype == values.numpy().dtype


def test_tensors_of_all_shards_are_one_checkpoint(two_shards):
    """Names and shapes come from every shard, and each tensor knows its file."""
    tensors = open_tensors(two_shards)

    shapes = {name: tensors.shape(name) for name in tensors.names()}
    assert shapes == {"embed": (50, 16), "norm": (16,), "head": (50, 16)}
    assert tensors.file("head") == two_shards.path / "two.safetensors"
    assert check_slices(tensors, "embed", random_tensor(50, 16).float().numpy())
    assert check_slices(tensors, "norm", random_tensor(16).float().numpy())


def check_slices(tensors: Tensors, name: str, expected: np.ndarray) -> bool:
    """Every slice is equal to that of the whole tensor, and may be written to."""
    rows = len(expected)
    for start in range(rows):
        for stop in (start, start + 1, (start + rows) // 2, rows, None):
            read = tensors.read(name, start, stop)
            np.testing.assert_array_equal(read, expected[start:stop])
            read[...] = 7.0
    return True


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "two.safetensors").unlink(), "two.safetensors: is missing.* names it"),
        (
            lambda f: damage(f / "two.safetensors", lambda b: b[:-1]),
            "two.safetensors: not a whole safetensors file",
        ),
        (
            lambda f: damage(f / "two.safetensors", lambda b: b[:8] + b"]" + b[9:]),
            "two.safetensors: not a whole safetensors file",
        ),
        (
            lambda f: damage(f / "two.safetensors", lambda _: b"version https://git-lfs"),
            "two.safetensors: not a whole safetensors file",
        ),
        (
            lambda f: (f / "two.safetensors").write_bytes(b""),
            "two.safetensors: not a whole safetensors file",
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
        (lambda f: (f / INDEX).unlink(), "holds neither model.safetensors nor"),
    ],
)
def test_a_bad_folder_is_refused_before_anything_is_read(two_shards, change, message):
    """One line names the file, and the tensor where it is one."""
    change(two_shards.path)

    with pytest.raises(ExportError, match=message) as caught:
        open_tensors(two_shards)

    assert str(two_shards.path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_tensor_is_named(two_shards):
    """What the caller looks for stands in the message, and where it was looked for."""
    tensors = open_tensors(two_shards)

    for use in (tensors.shape, tensors.read, tensors.file):
        with pytest.raises(ExportError, match=f"{INDEX}: has no tensor 'lm_head.weight'"):
            use("lm_head.weight")


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    """No rows are made up when the disk gives fewer bytes than the header promised."""
    file = tmp_path / "model.safetensors"
    save_file({"weight": random_tensor(8, 8)}, file)
    tensors = open_tensors(Source("test", "folder", tmp_path))
    damage(file, lambda b: b[:-1])

    with pytest.raises(ExportError, match=r"model.safetensors: ends within tensor 'weight'"):
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
rows = sum(len(part) for name in tensors.names() for part in matrix(tensors, name).slices())
print(rows, peak() - before)
"""


def read_all(path: Path) -> tuple[int, int]:
    """Reads a checkpoint in slices in a process of its own: rows, bytes by which it grew."""
    command = [sys.executable, "-c", READ_ALL, str(path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows, grown = output.split()
    return int(rows), int(grown)


def test_reading_gives_the_memory_back(tmp_path):
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
