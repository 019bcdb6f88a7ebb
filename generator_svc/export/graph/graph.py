"""An ONNX graph that is being rewritten. Knows nothing about language models.

Edits are made by name: nodes are added and removed freely, and `finish` drops what is no longer
reachable and sorts the rest topologically. Large weights are in the graph by name and dimensions
only: `matrices` has the sources of those that are not packed yet, `packings` how the others are
made when the graph is saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from generator_svc.export.weights.matrix import Array, Matrix
from generator_svc.export.weights.packing import Packed, Packing

MICROSOFT = "com.microsoft"


class Graph:
    """Nodes, initializers, inputs and outputs of a model without subgraphs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: dict[str, NodeProto] = {}
        self.initializers: dict[str, TensorProto] = {}
        self.matrices: dict[str, Matrix] = {}
        self.packings: list[Packing] = []
        self._index()

    def _index(self) -> None:
        graph = self.model.graph
        self.nodes = {node.name: node for node in graph.node}
        assert len(self.nodes) == len(graph.node), "node names are not unique"
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}

    @property
    def outputs(self) -> list[ValueInfoProto]:
        return list(self.model.graph.output)

    def node(self, name: str) -> NodeProto | None:
        return self.nodes.get(name)

    def under(self, prefix: str) -> list[NodeProto]:
        """The nodes of a module: those whose names begin with `prefix`."""
        return [node for name, node in self.nodes.items() if name.startswith(prefix)]

    def producer(self, tensor: str) -> NodeProto | None:
        return next((node for node in self.nodes.values() if tensor in node.output), None)

    def consumers(self, tensor: str) -> list[NodeProto]:
        return [node for node in self.nodes.values() if tensor in node.input]

    def array(self, name: str) -> Array:
        """The value of an initializer."""
        value: Array = numpy_helper.to_array(self.initializers[name])
        return value

    def constant(self, name: str, value: Array) -> str:
        """Adds an initializer and returns its name; one that exists under that name is reused."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def weight(self, name: str, matrix: Matrix, is_transposed: bool = False) -> str:
        """Adds a float initializer [rows, columns], or its transpose; returns its name."""
        dims = (matrix.rows, matrix.columns)
        packed = Packed(name, dims[::-1] if is_transposed else dims, TensorProto.FLOAT)
        self.initializers[name] = packed.proto()
        self.matrices[name] = matrix
        return name

    def stream(self, packing: Packing) -> list[str]:
        """Adds the initializers that `packing` makes; returns their names."""
        self.packings.append(packing)
        for output in packing.outputs:
            self.initializers[output.name] = output.proto()
        return [output.name for output in packing.outputs]

    def add(
        self,
        op: str,
        name: str,
        inputs: Iterable[str],
        outputs: Iterable[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Adds a node and returns its first output, by default named after the node."""
        assert name not in self.nodes, f"{name} already exists"
        names = list(outputs) if outputs is not None else [f"{name}/output_0"]
        self.nodes[name] = helper.make_node(
            op, list(inputs), names, name=name, domain=domain, **attributes
        )
        return names[0]

    def remove(self, nodes: Iterable[NodeProto]) -> None:
        for node in nodes:
            del self.nodes[node.name]

    def replace_uses(self, old: str, new: str) -> None:
        """Makes every node that reads `old` read `new` instead."""
        for node in self.nodes.values():
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new

    def finish(self) -> onnx.ModelProto:
        """Prunes and sorts the graph, writes it back into the model and returns that."""
        graph = self.model.graph
        order = self._sorted_live_nodes()
        used = {name for node in order for name in node.input}
        weights = [tensor for name, tensor in self.initializers.items() if name in used]
        inputs = [value for value in graph.input if value.name in used]
        for field, values in (
            ("node", order),
            ("initializer", weights),
            ("input", inputs),
        ):
            graph.ClearField(field)
            getattr(graph, field).extend(values)
        graph.ClearField("value_info")
        self._declare_domains()
        self._index()
        self.matrices = {k: v for k, v in self.matrices.items() if k in used}
        self.packings = [p for p in self.packings if any(out.name in used for out in p.outputs)]
        return self.model

    def _sorted_live_nodes(self) -> list[NodeProto]:
        """Depth-first from the outputs, so that producers come before consumers."""
        producers = {name: node for node in self.nodes.values() for name in node.output if name}
        order: list[NodeProto] = []
        done: set[str] = set()
        stack = [(value.name, False) for value in reversed(self.outputs)]
        while stack:
            tensor, inputs_done = stack.pop()
            node = producers.get(tensor)
            if node is None or node.name in done:
                continue
            if inputs_done:
                done.add(node.name)
                order.append(node)
                continue
            stack.append((tensor, True))
            stack.extend((name, False) for name in reversed(node.input) if name)
        return order

    def _declare_domains(self) -> None:
        known = {opset.domain for opset in self.model.opset_import}
        if MICROSOFT not in known:
            self.model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
