"""Makes a Llama-shaped model folder with random weights, of any size, on the spot.

    python -m bench.random_llama FOLDER --shape 8b --precision int4 --device cuda

The graph is like the one that `generator_svc.export` makes from a Llama checkpoint: packed
projections, GroupQueryAttention, fused norms, logits of the last position in float32. It is built
node by node, and weights go to the external data file as they are drawn, a piece at a time, so that
even a model of 16 GB needs little memory. They are scaled by their number of inputs, which keeps
activations and logits near one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import tokenizers
from onnx import TensorProto, helper

from generator_svc.export.checkpoint.decoder import Decoder, LayerAttention
from generator_svc.export.genai_config import GRAPH_FILE, WEIGHTS_FILE, genai_config
from generator_svc.export.graph.attention import COS, LENGTHS, SIN, TOTAL, add_lengths
from generator_svc.export.graph.graph import MICROSOFT, Graph
from generator_svc.export.graph.head import select_tokens

PRECISIONS = ("fp32", "fp16", "int8", "int4")
BLOCK_SIZE = 32
ACCURACY_LEVEL = 4
EPSILON = 1e-5
THETA = 500_000.0
IR_VERSION, OPSET = 10, 18  # the exporter's
END_TOKEN, BEGIN_TOKEN = 0, 1
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
_ALIGNMENT = 4096  # of tensors in the file, so that they can be memory-mapped
_PIECE = 2**24  # maximum number of elements drawn at a time


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; `context` in tokens."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocabulary: int
    context: int = 8192


SHAPES = {
    "tiny": Shape(32, 1, 1, 1, 16, 32, 640, 512),  # runs cost next to nothing
    "small": Shape(384, 6, 6, 2, 64, 1024, 16_384, 2048),
    "1b": Shape(2048, 16, 32, 8, 64, 8192, 128_256),
    "7b": Shape(3584, 28, 28, 4, 128, 18_944, 152_064, 32_768),  # Qwen2.5's, without its biases
    "8b": Shape(4096, 32, 32, 8, 128, 14_336, 128_256),
}


def make_random_llama(
    folder: Path, shape: Shape, precision: str, device: str = "cpu", seed: int = 0
) -> Path:
    """Writes the folder, which must not exist yet, completely or not at all; returns it.

    On `cuda`, everything that is not quantized is float16, except with fp32.
    """
    assert precision in PRECISIONS
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    is_half = precision == "fp16" or (device == "cuda" and precision != "fp32")
    with (partial / WEIGHTS_FILE).open("wb") as file:
        weights = _Weights(file, np.float16 if is_half else np.float32, seed)
        graph = _Llama(shape, precision, weights).build()
    onnx.save(graph.model, partial / GRAPH_FILE)
    _write_text_side(partial, shape, precision, device)
    partial.rename(folder)
    return folder


class _Weights:
    """Random tensors, each written as soon as it is drawn; `dtype` is that of all floats."""

    def __init__(self, file: BinaryIO, dtype: type[np.floating[Any]], seed: int) -> None:
        self.dtype = dtype
        self._file = file
        self._random = np.random.default_rng(seed)

    def normal(self, name: str, dims: tuple[int, ...], deviation: float) -> TensorProto:
        """Uniform numbers with this standard deviation around zero, in `dtype`."""
        kind = TensorProto.FLOAT16 if self.dtype is np.float16 else TensorProto.FLOAT
        width = 2 * 3**0.5 * deviation
        numbers = (
            ((self._random.random(count, np.float32) - 0.5) * width).astype(self.dtype)
            for count in _pieces(dims)
        )
        return self._write(name, dims, kind, numbers)

    def bytes(self, name: str, dims: tuple[int, ...]) -> TensorProto:
        """Uniform bytes: two 4-bit weights or one 8-bit weight each."""
        numbers = (self._random.integers(256, size=n, dtype=np.uint8) for n in _pieces(dims))
        return self._write(name, dims, TensorProto.UINT8, numbers)

    def constant(self, name: str, dims: tuple[int, ...], value: float) -> TensorProto:
        kind = TensorProto.FLOAT16 if self.dtype is np.float16 else TensorProto.FLOAT
        numbers = (np.full(count, value, self.dtype) for count in _pieces(dims))
        return self._write(name, dims, kind, numbers)

    def _write(
        self, name: str, dims: tuple[int, ...], kind: int, numbers: Iterator[np.ndarray[Any, Any]]
    ) -> TensorProto:
        offset = self._file.seek(-(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT)
        for piece in numbers:
            self._file.write(piece.data)
        tensor = TensorProto(name=name, data_type=kind, dims=dims)
        tensor.data_location = TensorProto.EXTERNAL
        places = {"location": WEIGHTS_FILE, "offset": offset, "length": self._file.tell() - offset}
        for key, value in places.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def _pieces(dims: tuple[int, ...]) -> Iterator[int]:
    """Numbers of elements per piece, which sum to all of them."""
    left = int(np.prod(dims))
    while left:
        yield min(left, _PIECE)
        left -= min(left, _PIECE)


class _Llama:
    """The graph, node by node, named as the exporter names them."""

    def __init__(self, shape: Shape, precision: str, weights: _Weights) -> None:
        self._shape = shape
        self._precision = precision
        self._weights = weights
        model = onnx.ModelProto(ir_version=IR_VERSION)
        model.opset_import.append(helper.make_opsetid("", OPSET))
        model.graph.name = "random_llama"
        self._graph = Graph(model)
        self._kind = TensorProto.FLOAT16 if weights.dtype is np.float16 else TensorProto.FLOAT

    def build(self) -> Graph:
        shape, graph = self._shape, self._graph
        add_lengths(graph)
        for name, table in zip((COS, SIN), _rotary_tables(shape), strict=True):
            graph.constant(name, table.astype(self._weights.dtype))
        stream = self._embedding()
        branch = ""
        for layer in range(shape.layers):
            module = f"/model/layers.{layer}"
            normed, stream = self._norm(f"{module}/input_layernorm", stream, branch)
            branch = self._attention(f"{module}/self_attn", layer, normed)
            normed, stream = self._norm(f"{module}/post_attention_layernorm", stream, branch)
            branch = self._mlp(f"{module}/mlp", normed)
        normed, _ = self._norm("/model/norm", stream, branch)
        self._head(normed)
        self._declare()
        graph.finish()
        return graph

    def _embedding(self) -> str:
        """An embedding with values of about one; int8 if the projections are int8 or int4."""
        shape, name = self._shape, "/model/embed_tokens/Gather"
        dims = (shape.vocabulary, shape.hidden)
        if self._precision in ("fp32", "fp16") or shape.hidden % BLOCK_SIZE:
            table = self._random("embed_tokens", dims, 1.0)
            return self._graph.add("Gather", name, [table, "input_ids"])
        table = self._keep(self._weights.bytes("embed_tokens.weight", dims))
        blocks = (shape.vocabulary, shape.hidden // BLOCK_SIZE)
        scale = 12**0.5 / 2**8  # uniform integers' standard deviation
        scales = self._keep(self._weights.constant("embed_tokens.scales", blocks, scale))
        return self._graph.add(
            "GatherBlockQuantized",
            name,
            [table, "input_ids", scales],
            domain=MICROSOFT,
            bits=8,
            block_size=BLOCK_SIZE,
            gather_axis=0,
            quantize_axis=1,
        )

    def _attention(self, module: str, layer: int, normed: str) -> str:
        shape = self._shape
        inner, cached = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        packed = self._product(f"{module}/qkv_proj", normed, shape.hidden, inner + 2 * cached)
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        attended = self._graph.add(
            "GroupQueryAttention",
            f"{module}/GroupQueryAttention",
            [packed, "", "", *past, LENGTHS, TOTAL, COS, SIN],
            [f"{module}/GroupQueryAttention/output_0", *present],
            domain=MICROSOFT,
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            scale=shape.head_size**-0.5,
            do_rotary=1,
            rotary_interleaved=0,
        )
        return self._product(f"{module}/o_proj", attended, inner, shape.hidden)

    def _mlp(self, module: str, normed: str) -> str:
        shape, graph = self._shape, self._graph
        joined = self._product(f"{module}/gate_up_proj", normed, shape.hidden, 2 * shape.ffn)
        gate, up = (f"{module}/gate_up_proj/Split/{half}" for half in ("gate", "up"))
        graph.add("Split", f"{module}/Split", [joined], [gate, up], axis=-1, num_outputs=2)
        swish = graph.add("Sigmoid", f"{module}/act_fn/Sigmoid", [gate])
        active = graph.add("Mul", f"{module}/act_fn/Mul", [gate, swish])
        product = graph.add("Mul", f"{module}/Mul", [active, up])
        return self._product(f"{module}/down_proj", product, shape.ffn, shape.hidden)

    def _head(self, normed: str) -> None:
        graph, shape = self._graph, self._shape
        last = select_tokens(graph, normed, shape.hidden)
        # The exporter keeps the head in int8 if the rest is int4.
        precision = "int8" if self._precision == "int4" else self._precision
        logits = self._product("/lm_head", last, shape.hidden, shape.vocabulary, precision)
        if self._kind == TensorProto.FLOAT:
            graph.nodes["/lm_head/MatMul"].output[0] = "logits"
        else:
            graph.add("Cast", "/lm_head/Cast", [logits], ["logits"], to=TensorProto.FLOAT)

    def _norm(self, module: str, stream: str, branch: str) -> tuple[str, str]:
        """The normalized sum of residual stream and branch, and the sum itself."""
        name = f"{module[1:].replace('/', '.')}.weight"
        weight = self._keep(self._weights.constant(name, (self._shape.hidden,), 1.0))
        result = f"{module}/output_0"
        if not branch:
            operator, inputs, outputs, domain = "", [stream, weight], [result], ""
            fields: dict[str, Any] = {"axis": -1, "stash_type": 1}
        else:
            operator, inputs, domain, fields = "Skip", [stream, branch, weight], MICROSOFT, {}
            stream = f"{module}/sum"
            outputs = [result, "", "", stream]
        operator += "SimplifiedLayerNormalization"
        self._graph.add(operator, module, inputs, outputs, domain=domain, epsilon=EPSILON, **fields)
        return result, stream

    def _product(
        self, module: str, source: str, inputs: int, outputs: int, precision: str = ""
    ) -> str:
        """[…, inputs] times a random matrix: […, outputs], with values of about the same size."""
        precision = precision or self._precision
        name = module[1:].replace("/", ".")
        if precision in ("fp32", "fp16"):
            weight = self._random(name, (inputs, outputs), inputs**-0.5)
            return self._graph.add("MatMul", f"{module}/MatMul", [source, weight])
        bits = int(precision.removeprefix("int"))
        blocks = -(-inputs // BLOCK_SIZE)
        weight = self._keep(
            self._weights.bytes(f"{name}.weight", (outputs, blocks, BLOCK_SIZE * bits // 8))
        )
        scale = inputs**-0.5 / (2**bits / 12**0.5)  # uniform integers' standard deviation
        scales = self._keep(self._weights.constant(f"{name}.scales", (outputs, blocks), scale))
        return self._graph.add(
            "MatMulNBits",
            f"{module}/MatMul",
            [source, weight, scales],
            domain=MICROSOFT,
            K=inputs,
            N=outputs,
            bits=bits,
            block_size=BLOCK_SIZE,
            accuracy_level=ACCURACY_LEVEL,
        )

    def _random(self, name: str, dims: tuple[int, ...], deviation: float) -> str:
        return self._keep(self._weights.normal(f"{name}.weight", dims, deviation))

    def _keep(self, tensor: TensorProto) -> str:
        self._graph.initializers[tensor.name] = tensor
        return str(tensor.name)

    def _declare(self) -> None:
        """Declares inputs and outputs, with one name per dynamic dimension."""
        shape, proto = self._shape, self._graph.model.graph
        cache = ["batch_size", shape.kv_heads, "max_sequence_length", shape.head_size]
        value = helper.make_tensor_value_info
        for name, length in (("input_ids", "sequence"), ("attention_mask", "total_sequence")):
            proto.input.append(value(name, TensorProto.INT64, ["batch_size", f"{length}_length"]))
        logits = ["batch_size", 1, shape.vocabulary]
        proto.output.append(value("logits", TensorProto.FLOAT, logits))
        for layer in range(shape.layers):
            for part in ("key", "value"):
                proto.input.append(value(f"past_key_values.{layer}.{part}", self._kind, cache))
                proto.output.append(value(f"present.{layer}.{part}", self._kind, cache))


def _rotary_tables(shape: Shape) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Cosines and sines, float64 [context, head size / 2]."""
    steps = np.arange(0, shape.head_size, 2) / shape.head_size
    angles = np.arange(shape.context)[:, None] / THETA**steps
    return np.cos(angles), np.sin(angles)


def _write_text_side(folder: Path, shape: Shape, precision: str, device: str) -> None:
    """Writes configurations, manifest, and a tokenizer that has one token per byte."""
    genai = genai_config(_decoder(shape), [END_TOKEN], BEGIN_TOKEN, END_TOKEN, {})
    if device == "cuda":
        genai["model"]["decoder"]["session_options"]["provider_options"] = [{"cuda": {}}]
    _byte_tokenizer().save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    files = {
        "genai_config.json": genai,
        "config.json": llama_config(shape),
        "tokenizer_config.json": {**tokens, "tokenizer_class": "PreTrainedTokenizerFast"},
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    manifest: dict[str, Any] = {"files": sizes, "precision": precision, "device": device}
    if device == "cuda" and precision in ("int8", "int4"):
        manifest["symmetric_block_size"] = BLOCK_SIZE
    (folder / "trivium_export.json").write_text(json.dumps(manifest, indent=2) + "\n")


def llama_config(shape: Shape) -> dict[str, Any]:
    """The shape as fields of transformers' LlamaConfig."""
    return {
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": EPSILON,
        "rope_theta": THETA,
        "tie_word_embeddings": False,
        "bos_token_id": BEGIN_TOKEN,
        "eos_token_id": END_TOKEN,
        "pad_token_id": END_TOKEN,
    }


def _decoder(shape: Shape) -> Decoder:
    attention = LayerAttention(scale=shape.head_size**-0.5, window=None)
    cos, sin = _rotary_tables(shape)
    return Decoder(
        family="llama",
        num_attention_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        hidden_size=shape.hidden,
        context_length=shape.context,
        vocab_size=shape.vocabulary,
        norm_epsilon=EPSILON,
        tied_embeddings=False,
        layers=(attention,) * shape.layers,
        cos=cos,
        sin=sin,
    )


def _byte_tokenizer() -> tokenizers.Tokenizer:
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(("<|end|>", "<|begin|>", *letters))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|begin|>"])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    print(make_random_llama(options.folder, shape, options.precision, options.device))


if __name__ == "__main__":
    main()
