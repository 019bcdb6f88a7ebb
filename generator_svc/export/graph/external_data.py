"""Writes a graph and its weights: small ones in the graph, the others in a data file next to it.

Free space is checked before the first weight is read, so a disk that is too small is noticed at
once. Slices are read and packed on all cores, a few ahead, and written in order.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from generator_svc.export.graph.graph import Graph
from generator_svc.export.progress import Progress, silent
from generator_svc.export.weights.matrix import Array
from generator_svc.export.weights.packing import MAX_HALF, Packed, Packing, pack_matrix
from trivium.host_limits import cpu_limit

# ONNX Runtime 1.31 reads up to 13, but older readers of the layout need a lower one.
IR_VERSION = 10
STEP = "writing the weights"
MIN_EXTERNAL = 1024  # bytes
ALIGNMENT = 4096  # of tensors in the file: a page, so that they can be memory-mapped
MAX_AHEAD = 4  # slices that are packed while one is written


def save(graph: Graph, model: Path, data: Path, progress: Progress = silent) -> None:
    """Writes `model` and, next to it, `data`; matrices that are not packed yet become floats."""
    _pack_floats(graph)
    graph.finish()
    packed = {out.name: out for packing in graph.packings for out in packing.outputs}
    offsets: dict[str, int] = {}
    size = 0
    for name, tensor in graph.initializers.items():
        nbytes = packed[name].nbytes if name in packed else len(tensor.raw_data)
        if name in packed or nbytes >= MIN_EXTERNAL:
            offsets[name] = size
            size += -(-nbytes // ALIGNMENT) * ALIGNMENT
            _place(tensor, data.name, offsets[name], nbytes)
    if shutil.disk_usage(data.parent).free < size:
        reason = f"{os.strerror(errno.ENOSPC)} ({size:,} bytes are needed)"
        raise OSError(errno.ENOSPC, reason, str(data))
    with data.open("wb") as file:
        file.truncate(size)
        writer = _Writer(file.fileno(), offsets, size, progress)
        for name in offsets.keys() - packed.keys():
            writer.write(offsets[name], graph.initializers[name].raw_data)
            graph.initializers[name].ClearField("raw_data")
        with ThreadPoolExecutor(cpu_limit().cores) as pool:
            for packing in graph.packings:
                writer.write_packing(packing, pool)
    graph.model.ir_version = IR_VERSION
    onnx.save(graph.model, model)


def _place(tensor: TensorProto, file: str, offset: int, nbytes: int) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    places = {"location": file, "offset": offset, "length": nbytes}
    for key, value in places.items():
        tensor.external_data.add(key=key, value=str(value))


def _pack_floats(graph: Graph) -> None:
    """Packs the remaining matrices as floats, transposed if a product reads them."""
    for name, matrix in graph.matrices.items():
        tensor = graph.initializers[name]
        is_transposed = any(node.op_type == "MatMul" for node in graph.consumers(name))
        output = Packed(name, tuple(tensor.dims), tensor.data_type, is_transposed)
        graph.stream(pack_matrix((output,), matrix, lambda rows: (rows,)))
    graph.matrices.clear()


class _Writer:
    """Writes tensors at their offsets and reports the bytes written."""

    def __init__(self, file: int, offsets: dict[str, int], size: int, progress: Progress) -> None:
        self._file = file
        self._offsets = offsets
        self._size = size
        self._progress = progress
        self._written = 0

    def write(self, offset: int, content: bytes | memoryview) -> int:
        """Writes all of `content` and returns the offset of its end."""
        view = memoryview(content).cast("B")
        while view:
            done = os.pwrite(self._file, view, offset)
            offset += done
            view = view[done:]
            self._written += done
            self._progress(STEP, self._written, self._size)
        return offset

    def write_packing(self, packing: Packing, pool: ThreadPoolExecutor) -> None:
        cursors = [_Cursor(out, self._offsets.get(out.name), self.write) for out in packing.outputs]
        for arrays in _in_order(packing, pool):
            for cursor, values in zip(cursors, arrays, strict=True):
                cursor.append(values)
        for cursor in cursors:
            cursor.close()


class _Cursor:
    """Where to write the next slice of an initializer; discards it if the graph does not use it."""

    def __init__(
        self, output: Packed, offset: int | None, write: Callable[[int, Any], int]
    ) -> None:
        self._output = output
        self._offset = offset
        self._write = write
        self._rows = 0
        # Columns are scattered over the whole tensor, so it is assembled in memory.
        is_kept = output.is_transposed and offset is not None
        self._whole = np.empty(output.dims, output.dtype) if is_kept else None

    def append(self, values: Array) -> None:
        if self._offset is None:
            return
        values = _converted(values, self._output.dtype)
        if self._whole is None:
            self._offset = self._write(self._offset, np.ascontiguousarray(values).data)
        else:
            self._whole[:, self._rows : self._rows + len(values)] = values.T
        self._rows += len(values)

    def close(self) -> None:
        """Checks that the tensor is complete, and writes it if it was assembled in memory."""
        axis = 1 if self._output.is_transposed else 0
        assert self._offset is None or self._rows == self._output.dims[axis], self._output.name
        if self._whole is not None and self._offset is not None:
            self._write(self._offset, self._whole.data)


def _converted(values: Array, dtype: np.dtype[Any]) -> Array:
    if dtype == np.float16 and values.dtype != dtype:
        values = np.clip(values, -MAX_HALF, MAX_HALF)
    return values.astype(dtype, copy=False)


def _in_order(packing: Packing, pool: ThreadPoolExecutor) -> Iterator[tuple[Array, ...]]:
    """Yields the slices in order while the next ones are made."""
    ahead: deque[Future[tuple[Array, ...]]] = deque()
    try:
        for make in packing.slices:
            ahead.append(pool.submit(make))
            if len(ahead) > MAX_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()
