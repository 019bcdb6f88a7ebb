"""Writes a checkpoint as it is published, but for its weights, which are random.

    python -m bench.random_checkpoint qwen-2.5-7b FOLDER
    python -m bench.random_checkpoint gpt-oss-20b FOLDER --layers 4

The result is a Hugging Face folder: the real configurations, tensors under their real names in
safetensors shards with an index, and the real special tokens. So a model's export can be timed and
measured without its weights. Random weights are scaled by their number of inputs, which keeps
activations and logits near one. They are drawn and written piece by piece, in less than 200 MB of
memory.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, BinaryIO

import numpy as np

from bench.published import PUBLISHED, Published
from bench.published_text import write_text_side

SHARD_BYTES = 4 * 10**9
MXFP4_BLOCK = 32  # elements that share a scale
# Root mean square of the sixteen values of MXFP4's 4-bit elements.
MXFP4_DEVIATION = float(np.sqrt(np.square([0, 0.5, 1, 1.5, 2, 3, 4, 6]).mean()))
_PIECE = 2**22  # bytes drawn at a time


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of the checkpoint: `kind` is bf16, or MXFP4's blocks or scales, both uint8.

    Values are normal with this mean and standard deviation; for scales, `deviation` is that of the
    scaled weights.
    """

    name: str
    shape: tuple[int, ...]
    deviation: float
    mean: float = 0.0
    kind: str = "bf16"

    @property
    def dtype(self) -> str:
        """The name in safetensors."""
        return "BF16" if self.kind == "bf16" else "U8"

    @property
    def size(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape)) * (2 if self.dtype == "BF16" else 1)


def write_random_checkpoint(
    folder: Path, published: Published, seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Writes the folder, which must not exist yet, completely or not at all; returns it."""
    if folder.exists():
        raise FileExistsError(f"{folder} already exists")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_text_side(partial, published)
        _write_weights(partial, published, seed, shard_bytes)
    except BaseException:
        shutil.rmtree(partial)
        raise
    partial.rename(folder)
    return folder


def _write_weights(folder: Path, published: Published, seed: int, shard_bytes: int) -> None:
    """Writes the shards, and the index that says which tensor is in which."""
    random = np.random.default_rng(seed)
    shards = _shards(list(checkpoint_tensors(published.config)), shard_bytes)
    places: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / name).open("wb") as file:
            _write_shard(file, tensors, random)
        places |= {tensor.name: name for tensor in tensors}
    size = sum(tensor.size for tensors in shards for tensor in tensors)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def checkpoint_tensors(config: dict[str, Any]) -> Iterator[CheckpointTensor]:
    """All tensors of a checkpoint with this configuration: Llama, Qwen 2 or gpt-oss."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield CheckpointTensor("model.embed_tokens.weight", (vocabulary, hidden), 1.0)
    for layer in range(config["num_hidden_layers"]):
        module = f"model.layers.{layer}"
        yield _norm(f"{module}.input_layernorm", hidden)
        yield from _attention(f"{module}.self_attn", config)
        yield _norm(f"{module}.post_attention_layernorm", hidden)
        mlp = _experts if config["model_type"] == "gpt_oss" else _mlp
        yield from mlp(f"{module}.mlp", config)
    yield _norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        yield from _linear("lm_head", hidden, vocabulary)


def _attention(module: str, config: dict[str, Any]) -> Iterator[CheckpointTensor]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_size = config.get("head_dim") or hidden // heads
    inner, cached = heads * head_size, config["num_key_value_heads"] * head_size
    # Qwen 2's configuration has no field for its biases.
    on_input = config.get("attention_bias", config["model_type"] == "qwen2")
    on_output = config.get("attention_bias", False)
    yield from _linear(f"{module}.q_proj", hidden, inner, bias=on_input)
    yield from _linear(f"{module}.k_proj", hidden, cached, bias=on_input)
    yield from _linear(f"{module}.v_proj", hidden, cached, bias=on_input)
    yield from _linear(f"{module}.o_proj", inner, hidden, bias=on_output)
    if config["model_type"] == "gpt_oss":
        yield CheckpointTensor(f"{module}.sinks", (heads,), 1.0)


def _mlp(module: str, config: dict[str, Any]) -> Iterator[CheckpointTensor]:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    yield from _linear(f"{module}.gate_proj", hidden, ffn)
    yield from _linear(f"{module}.up_proj", hidden, ffn)
    yield from _linear(f"{module}.down_proj", ffn, hidden)


def _experts(module: str, config: dict[str, Any]) -> Iterator[CheckpointTensor]:
    """Router in bf16, experts in MXFP4: [experts, outputs, blocks of inputs, bytes of a block]."""
    experts, hidden = config["num_local_experts"], config["hidden_size"]
    ffn = config["intermediate_size"]
    yield from _linear(f"{module}.router", hidden, experts, bias=True)
    for name, inputs, outputs in (("gate_up_proj", hidden, 2 * ffn), ("down_proj", ffn, hidden)):
        assert inputs % MXFP4_BLOCK == 0, f"{inputs} inputs are not whole blocks"
        blocks = (experts, outputs, inputs // MXFP4_BLOCK)
        name, deviation = f"{module}.experts.{name}", inputs**-0.5
        yield CheckpointTensor(f"{name}_bias", (experts, outputs), 0.1)
        yield CheckpointTensor(f"{name}_blocks", (*blocks, MXFP4_BLOCK // 2), 0.0, kind="blocks")
        yield CheckpointTensor(f"{name}_scales", blocks, deviation, kind="scales")


def _linear(
    module: str, inputs: int, outputs: int, bias: bool = False
) -> Iterator[CheckpointTensor]:
    yield CheckpointTensor(f"{module}.weight", (outputs, inputs), inputs**-0.5)
    if bias:
        yield CheckpointTensor(f"{module}.bias", (outputs,), 0.1)


def _norm(module: str, size: int) -> CheckpointTensor:
    return CheckpointTensor(f"{module}.weight", (size,), 0.1, mean=1.0)


def _shards(tensors: list[CheckpointTensor], max_bytes: int) -> list[list[CheckpointTensor]]:
    """Groups tensors in order, as many per shard as fit, at least one."""
    shards: list[list[CheckpointTensor]] = []
    left = 0
    for tensor in tensors:
        if tensor.size > left:
            shards.append([])
            left = max_bytes
        shards[-1].append(tensor)
        left -= tensor.size
    return shards


def _write_shard(
    file: BinaryIO, tensors: list[CheckpointTensor], random: np.random.Generator
) -> None:
    """Writes the safetensors format: the header's length in 8 bytes, the header, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + tensor.size
        entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
        header[tensor.name] = entry
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        for piece in _numbers(tensor, random):
            file.write(piece.data)


def _numbers(
    tensor: CheckpointTensor, random: np.random.Generator
) -> Iterator[np.ndarray[Any, Any]]:
    """The tensor's bytes in pieces: uint16 with the bits of bf16, or uint8."""
    for start in range(0, tensor.size, _PIECE):
        size = min(_PIECE, tensor.size - start)
        drawn = random.integers(2**64, size=-(-size // 8), dtype=np.uint64).view(np.uint8)[:size]
        if tensor.kind == "blocks":
            yield drawn
        elif tensor.kind == "scales":
            yield _exponents(tensor.deviation)[drawn]
        else:
            yield _normal(tensor.mean, tensor.deviation)[drawn.view(np.uint16)]


@cache
def _normal(mean: float, deviation: float) -> np.ndarray[Any, Any]:
    """The bf16 bits (uint16 [65536]) of the normal distribution's quantiles at equal steps.

    Indexed by 16 random bits, which is much faster than drawing normal numbers.
    """
    bits = (mean + deviation * _quantiles()).astype(np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to the nearest, ties to even
    return (rounded >> 16).astype(np.uint16)


@cache
def _quantiles() -> np.ndarray[Any, Any]:
    """Quantiles of the standard normal distribution, float64 [65536]."""
    return np.array([NormalDist().inv_cdf((step + 0.5) / 2**16) for step in range(2**16)])


@cache
def _exponents(deviation: float) -> np.ndarray[Any, Any]:
    """E8M0 scales (uint8 [256]) with which random blocks have about this standard deviation.

    Half are the base scale, a quarter half of it, a quarter twice: 1.25 is their root mean square.
    """
    usual = 127 + round(math.log2(deviation / MXFP4_DEVIATION / 1.25))
    return np.array([usual - 1, usual, usual, usual + 1] * 64, np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PUBLISHED)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="number of layers; default: all of the model's")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    published = PUBLISHED[options.name]
    if options.layers is not None:
        layers = published.config["num_hidden_layers"]
        if not 1 <= options.layers <= layers:
            parser.error(f"--layers: {options.name} has {layers}; choose from 1 to {layers}")
        published = published.with_config(num_hidden_layers=options.layers)
    start = time.monotonic()
    try:
        write_random_checkpoint(options.folder, published, options.seed)
    except OSError as error:
        parser.exit(1, f"{error}\n")
    size = sum(file.stat().st_size for file in options.folder.iterdir())
    print(f"{options.folder}: {size / 1e9:.2f} GB in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
