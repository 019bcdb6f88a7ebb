"""A matrix of a checkpoint that is read in slices of rows and is never in memory as a whole."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Elements of a slice: 16 MiB in float32, large enough to make the overhead per slice negligible.
MAX_SLICE = 2**22


@dataclass(frozen=True)
class Matrix:
    """Rows are outputs of a linear layer or tokens of an embedding, as in PyTorch.

    `read(start, stop)` returns rows start to stop as float32 [stop - start, columns], an array that
    the caller may modify.
    """

    rows: int
    columns: int
    read: Callable[[int, int], Array]

    def slices(self) -> list[Callable[[], Array]]:
        """Functions that read all rows in order, each at most about `MAX_SLICE` elements."""
        step = max(1, MAX_SLICE // self.columns)
        return [
            partial(self.read, start, min(start + step, self.rows))
            for start in range(0, self.rows, step)
        ]


def stack(parts: Sequence[Matrix]) -> Matrix:
    """The rows of all parts, one part after the other; all have the same number of columns."""
    (columns,) = {part.columns for part in parts}
    ends = list(accumulate(part.rows for part in parts))

    def read(start: int, stop: int) -> Array:
        pieces = []
        while start < stop:
            index = bisect_right(ends, start)
            first = ends[index] - parts[index].rows
            end = min(stop, ends[index])
            pieces.append(parts[index].read(start - first, end - first))
            start = end
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    return Matrix(ends[-1], columns, read)


def scale(matrix: Matrix, *, rows: Array | None = None, columns: Array | None = None) -> Matrix:
    """Every row and every column multiplied by its own factor, float32 [rows] and [columns]."""

    def read(start: int, stop: int) -> Array:
        values = matrix.read(start, stop)
        if rows is not None:
            values *= rows[start:stop, None]
        if columns is not None:
            values *= columns
        return values

    return Matrix(matrix.rows, matrix.columns, read)
