"""The KV cache's memory: one tensor per layer for keys and one for values.

Each is [slots, kv_heads, slot_length, head_size], so a range of slots is contiguous and can be
bound as past and present at once.
"""

import math
import mmap
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Shape = tuple[int, int, int, int]


class SlotMemory(Protocol):
    """`tensors` tensors of one `shape`; tensor 2 i holds layer i's keys, 2 i + 1 its values."""

    shape: Shape
    dtype: Any
    size_in_bytes: int

    def address(self, tensor: int, slot: int) -> int:
        """The address at which a slot of a tensor begins, on the device for CUDA."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of one slot to another, in every tensor."""

    def swap(self, first: int, second: int, length: int) -> None:
        """Exchanges the first `length` tokens of two slots, in every tensor."""

    def free(self) -> None:
        """Frees the memory, which must not be used afterwards."""


class HostMemory:
    """Slots in main memory. The system commits pages when they are first written.

    Memory-mapped rather than allocated by numpy, which requests huge pages: the first write to a
    slot would then zero all of it, which took half a second, against 7 ms with ordinary pages.
    """

    def __init__(self, tensors: int, shape: Shape, dtype: npt.DTypeLike) -> None:
        self.shape = shape
        self.dtype = dtype
        self._tensors = [_map_zeros(shape, np.dtype(dtype)) for _ in range(tensors)]
        self.size_in_bytes = sum(tensor.nbytes for tensor in self._tensors)

    def address(self, tensor: int, slot: int) -> int:
        return int(self._tensors[tensor][slot:].ctypes.data)

    def copy(self, source: int, target: int, length: int) -> None:
        for tensor in self._tensors:
            tensor[target, :, :length] = tensor[source, :, :length]

    def swap(self, first: int, second: int, length: int) -> None:
        for tensor in self._tensors:
            kept = tensor[first, :, :length].copy()
            tensor[first, :, :length] = tensor[second, :, :length]
            tensor[second, :, :length] = kept

    def free(self) -> None:
        self._tensors.clear()


def _map_zeros(shape: Shape, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return np.frombuffer(memory, dtype).reshape(shape)
