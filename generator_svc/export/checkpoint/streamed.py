"""PyTorch layers whose weights stay in the checkpoint and are read when they are used.

With them, the forward pass of transformers works for a model of any size: it reads the checkpoint
once, with one slice in memory. In a trace they leave a mark instead, which `graph/skeleton.py`
replaces by the product that it stands for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from generator_svc.export.weights.matrix import Matrix

# The operator that marks a streamed layer in a trace. It only pads (or truncates) the last axis, so
# that the traced graph can be run, as Optimum does to find its dynamic axes.
MARK = "Pad"


class StreamedLinear(torch.nn.Module):  # type: ignore[misc]
    """x @ matrix.T + bias, for x [..., in_features] and bias [out_features] or None."""

    def __init__(self, matrix: Matrix, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias = bias

    @property
    def in_features(self) -> int:
        return self.matrix.columns

    @property
    def out_features(self) -> int:
        return self.matrix.rows

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing():
            return _Marked.apply(inputs, self.in_features, self.out_features, inputs.dim())
        outputs = inputs.new_empty((*inputs.shape[:-1], self.out_features))
        start = 0
        for read in self.matrix.slices():
            rows = read()
            stop = start + len(rows)
            outputs[..., start:stop] = functional.linear(inputs, torch.from_numpy(rows))
            start = stop
        return outputs if self.bias is None else outputs + self.bias


class StreamedEmbedding(torch.nn.Module):  # type: ignore[misc]
    """The rows of the matrix at the given token ids."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing():
            spread = ids.unsqueeze(-1).to(torch.float32)
            return _Marked.apply(spread, 1, self.matrix.columns, spread.dim())
        tokens, places = ids.unique(return_inverse=True)
        rows = np.concatenate([self.matrix.read(row, row + 1) for row in tokens.tolist()])
        return torch.from_numpy(rows)[places]


class _Marked(torch.autograd.Function):  # type: ignore[misc]
    """Changes the length of the last axis: a single node in the trace, named after its module."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, old: int, new: int, axes: int) -> torch.Tensor:
        return functional.pad(inputs, (0, new - old))

    @staticmethod
    def symbolic(graph: Any, inputs: Any, old: int, new: int, axes: int) -> Any:
        pads = torch.tensor([0] * (2 * axes - 1) + [new - old])
        return graph.op(MARK, inputs, graph.op("Constant", value_t=pads), mode_s="constant")
