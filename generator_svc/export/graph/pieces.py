"""Cuts a saved graph between its layers, so that it can be run one piece at a time.

Knows nothing about the layers except that node names tell which layer they belong to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, ValueInfoProto, helper

from generator_svc.export.weights.matrix import MAX_SLICE, Array

_LAYER = re.compile(r"/layers\.(\d+)/")
BEFORE, AFTER = -1, 2**31


@dataclass(frozen=True)
class Piece:
    """Some consecutive layers of a graph.

    `inputs` come from the graph's inputs and from earlier pieces, `outputs` go to the graph's
    outputs and to later pieces.
    """

    nodes: tuple[NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class CutGraph:
    """The graph in the file `model`, cut into pieces of at most `max_bytes` of weights.

    A piece has at least one layer; what precedes the first and follows the last count as layers.
    But a floating-point product with more weights than that is a piece of its own, for `multiply`.
    """

    def __init__(self, model: Path, max_bytes: int) -> None:
        self.folder = model.parent
        self.model: ModelProto = onnx.load(model, load_external_data=False)
        self._initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.pieces = tuple(self._pieces(max_bytes))

    @property
    def total_bytes(self) -> int:
        return self.nbytes(self.model.graph.node)

    def is_product(self, piece: Piece) -> bool:
        return len(piece.nodes) == 1 and piece.nodes[0].op_type == "MatMul"

    @property
    def cache_dtype(self) -> np.dtype[Any]:
        """Data type of keys and values."""
        cache = next(v for v in self.model.graph.input if v.name.startswith("past_key_values."))
        kind: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(cache.type.tensor_type.elem_type)
        return kind

    def _pieces(self, max_bytes: int) -> Iterator[Piece]:
        layers: dict[int, list[NodeProto]] = {}
        produced: dict[str, int] = {}  # the layer that produces each tensor
        for node in self.model.graph.node:  # in topological order
            match = _LAYER.search(node.name)
            # Nodes outside of layers come first if they depend on no layer, wherever they are.
            is_before = all(produced.get(name, BEFORE) == BEFORE for name in node.input)
            layer = int(match[1]) if match else BEFORE if is_before else AFTER
            produced |= dict.fromkeys(node.output, layer)
            layers.setdefault(layer, []).append(node)
        parts = [
            part for _, nodes in sorted(layers.items()) for part in self._split(nodes, max_bytes)
        ]
        group: list[NodeProto] = []
        for nodes in parts:
            if group and self.nbytes([*group, *nodes]) > max_bytes:
                yield self._piece(group)
                group = []
            group = [*group, *nodes]
        yield self._piece(group)

    def _split(self, nodes: list[NodeProto], max_bytes: int) -> Iterator[list[NodeProto]]:
        """Splits off floating-point products that are too large for a piece."""
        group: list[NodeProto] = []
        for node in nodes:
            if node.op_type == "MatMul" and self.nbytes([node]) > max_bytes:
                yield group
                yield [node]
                group = []
            else:
                group.append(node)
        if group:
            yield group

    def multiply(self, product: NodeProto, rows: Array) -> Array:
        """`rows` @ weight, float32 [n, inputs] to [n, outputs], with the weight read in slices.

        ONNX Runtime would hold a large weight three times: as stored, in float32, and packed.
        """
        tensor = self._initializers[product.input[1]]
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        inputs, outputs = tensor.dims
        result = np.zeros((len(rows), outputs), np.float32)
        step = max(1, MAX_SLICE // outputs)
        for start in range(0, inputs, step):
            count = min(step, inputs - start)
            offset = int(place["offset"]) + start * outputs * dtype.itemsize
            path = self.folder / place["location"]
            weight = np.fromfile(path, dtype, count * outputs, offset=offset)
            part = weight.reshape(count, outputs).astype(np.float32)
            result += rows[:, start : start + count] @ part
        return result

    def nbytes(self, nodes: Sequence[NodeProto]) -> int:
        """Bytes of the weights that `nodes` read from the graph's data file."""
        names = {name for node in nodes for name in node.input} & self._initializers.keys()
        places = [
            {entry.key: entry.value for entry in self._initializers[name].external_data}
            for name in names
        ]
        return sum(int(place["length"]) for place in places if place)

    def _piece(self, nodes: list[NodeProto]) -> Piece:
        produced = {name for node in nodes for name in node.output if name}
        read = {name for node in nodes for name in node.input if name}
        own = {node.name for node in nodes}
        others = (node for node in self.model.graph.node if node.name not in own)
        needed = {name for node in others for name in node.input}
        needed |= {value.name for value in self.model.graph.output}
        inputs = read - produced - self._initializers.keys()
        return Piece(tuple(nodes), tuple(sorted(inputs)), tuple(sorted(produced & needed)))

    def save(self, piece: Piece, inputs: dict[str, Array]) -> Path:
        """Writes `piece` as a model of its own next to the graph, whose data file it shares.

        `inputs` give the types of tensors from earlier pieces.
        """
        model = ModelProto()
        model.CopyFrom(self.model)
        graph = model.graph
        known = {value.name: value for value in self.model.graph.input}
        read = {name for node in piece.nodes for name in node.input}
        for field, values in (
            ("node", piece.nodes),
            ("initializer", [t for n, t in self._initializers.items() if n in read]),
            ("input", [known.get(name) or _value(name, inputs[name]) for name in piece.inputs]),
            ("output", [ValueInfoProto(name=name) for name in piece.outputs]),
        ):
            graph.ClearField(field)
            getattr(graph, field).extend(values)
        path = self.folder / ".piece.onnx"
        onnx.save(model, path)
        return path


def _value(name: str, array: Array) -> ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor_value_info(name, kind, [None] * array.ndim)
