"""A GGUF file as the Hugging Face checkpoint that llama.cpp converted it from.

Names are translated, quantised blocks are dequantised to float32, and the rows of Llama's query and
key projections are put back into their original order.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFReader, dequantize

from generator_svc.export.checkpoint.file_tensors import FileTensor, FileTensors
from generator_svc.export.errors import ExportError
from generator_svc.export.weights.matrix import Array

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral is llama too

# Standardized tensor names of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
OUTSIDE_LAYERS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    # The divisors of the frequencies in Llama 3.1's rope scaling. The file lacks its configuration,
    # and Hugging Face checkpoints have no such tensor.
    "rope_freqs": "rope_freqs",
}
IN_LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Follows from the configuration, so checkpoints have no tensors for it.
ROTARY = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")


def open_gguf(path: Path) -> FileTensors:
    """The checkpoint in the file `path`, which is checked at once, except for its weights' values.

    Raises ExportError if the file is truncated, damaged or one part of several, or if its
    architecture, a tensor or a quantisation type is not supported.
    """
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        raise ExportError(f"{path}: truncated, damaged or not a GGUF file: {error}") from error
    if reader.endianess != GGUFEndian.LITTLE:
        raise ExportError(f"{path}: is big-endian, which is not supported")
    if (parts := _metadata(reader, "split.count") or 1) > 1:
        raise ExportError(
            f"{path}: is one of {parts} parts; merge them with llama-gguf-split --merge"
        )
    architecture = _metadata(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise ExportError(
            f"{path}: architecture {architecture!r} is not supported "
            f"(supported: {', '.join(ARCHITECTURES)})"
        )
    scaling = _metadata(reader, f"{architecture}.rope.scaling.type") or "none"
    if scaling != "none":
        raise ExportError(
            f"{path}: rope scaling {scaling!r} is not supported in GGUF files; export from the "
            "Hugging Face folder instead"
        )
    heads = _permuted_heads(path, reader) if architecture == "llama" else {}
    # The reader memory-maps the whole file, so nothing may keep a reference to it.
    return FileTensors(
        path,
        {
            _translate(path, tensor.name): _tensor(path, tensor, heads)
            for tensor in reader.tensors
            if not ROTARY.fullmatch(tensor.name)
        },
    )


def _metadata(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _permuted_heads(path: Path, reader: GGUFReader) -> dict[str, int]:
    """The tensors of a layer whose rows llama.cpp permutes, with their numbers of heads."""
    queries = _metadata(reader, "llama.attention.head_count")
    keys = _metadata(reader, "llama.attention.head_count_kv") or queries
    if not (isinstance(queries, int) and isinstance(keys, int)):
        raise ExportError(f"{path}: llama.attention.head_count must be the same for all layers")
    return {"attn_q": queries, "attn_k": keys}


def _translate(path: Path, name: str) -> str:
    if match := TENSOR.fullmatch(name):
        layer, part, kind = match.groups()
        if layer is None and part in OUTSIDE_LAYERS:
            return f"{OUTSIDE_LAYERS[part]}.{kind}"
        if layer is not None and part in IN_LAYERS:
            return f"model.layers.{layer}.{IN_LAYERS[part]}.{kind}"
    raise ExportError(f"{path}: tensor {name!r} is not supported: not part of a dense decoder")


def _tensor(path: Path, tensor: Any, permuted_heads: dict[str, int]) -> FileTensor:
    """`tensor` is a gguf.ReaderTensor, whose first dimension is the contiguous one."""
    kind, shape = tensor.tensor_type, tuple(reversed(tensor.shape.tolist()))
    row_bytes, rest = divmod(int(tensor.n_bytes), shape[0])
    if rest or not _can_dequantize(kind):
        raise ExportError(f"{path}: tensor {tensor.name!r} is {kind.name}, which is not supported")
    heads = next((n for part, n in permuted_heads.items() if f".{part}." in tensor.name), None)
    if heads is None:
        return FileTensor(path, int(tensor.data_offset), shape, row_bytes, _decode(kind))
    size, rest = divmod(shape[0], heads)
    if rest or size % 2:
        raise ExportError(f"{path}: tensor {tensor.name!r} has {shape[0]} rows for {heads} heads")
    decode = _decode_heads(kind, size)
    return FileTensor(path, int(tensor.data_offset), shape, row_bytes, decode, size)


def _can_dequantize(kind: GGMLQuantizationType) -> bool:
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _decode(kind: GGMLQuantizationType) -> Callable[[Array], Array]:
    return lambda raw: dequantize(raw, kind)


def _decode_heads(kind: GGMLQuantizationType, head_size: int) -> Callable[[Array], Array]:
    """Decodes whole heads whose rows are permuted.

    The rotary embedding pairs rows of the two halves of a head. llama.cpp interleaves them
    (`LlamaModel.permute` in its convert_hf_to_gguf.py); Hugging Face checkpoints have one half
    after the other.
    """

    def decode(raw: Array) -> Array:
        pairs = raw.reshape(-1, head_size // 2, 2, raw.shape[1])
        halves = pairs.swapaxes(1, 2).reshape(raw.shape)
        values: Array = dequantize(halves, kind)
        return values

    return decode
