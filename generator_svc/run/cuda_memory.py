"""Slots in device memory, allocated and copied through the CUDA runtime."""

import ctypes

import numpy as np
import numpy.typing as npt

from generator_svc import cuda
from generator_svc.run.slot_memory import Shape

_DEVICE_TO_DEVICE = 3


class CudaMemory:
    """SlotMemory on the CUDA device."""

    def __init__(self, tensors: int, shape: Shape, dtype: npt.DTypeLike) -> None:
        self.shape = shape
        self.dtype = dtype
        self._runtime = cuda.runtime()
        slots, self._heads, slot_length, head_size = shape
        self._token_bytes = head_size * np.dtype(dtype).itemsize
        self._head_bytes = slot_length * self._token_bytes
        self._slot_bytes = self._heads * self._head_bytes
        self.size_in_bytes = tensors * slots * self._slot_bytes
        self._tensors = [self._allocate(slots * self._slot_bytes) for _ in range(tensors)]
        self._spare = self._allocate(self._slot_bytes)

    def address(self, tensor: int, slot: int) -> int:
        return self._tensors[tensor] + slot * self._slot_bytes

    def copy(self, source: int, target: int, length: int) -> None:
        for tensor in range(len(self._tensors)):
            self._copy(self.address(tensor, source), self.address(tensor, target), length)
        cuda.check(self._runtime.cudaDeviceSynchronize(), "cudaDeviceSynchronize")

    def swap(self, first: int, second: int, length: int) -> None:
        for tensor in range(len(self._tensors)):
            one, other = self.address(tensor, first), self.address(tensor, second)
            self._copy(one, self._spare, length)
            self._copy(other, one, length)
            self._copy(self._spare, other, length)
        cuda.check(self._runtime.cudaDeviceSynchronize(), "cudaDeviceSynchronize")

    def free(self) -> None:
        for address in (*self._tensors, self._spare):
            code = self._runtime.cudaFree(ctypes.c_void_p(address))
            cuda.check(code, "cudaFree")

    def _allocate(self, size: int) -> int:
        address = ctypes.c_void_p()
        code = self._runtime.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(size))
        cuda.check(code, f"cudaMalloc of {size} bytes")
        code = self._runtime.cudaMemset(address, ctypes.c_int(0), ctypes.c_size_t(size))
        cuda.check(code, "cudaMemset")
        assert address.value is not None
        return address.value

    def _copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of every head, a strided block in memory."""
        code = self._runtime.cudaMemcpy2D(
            ctypes.c_void_p(target),
            ctypes.c_size_t(self._head_bytes),
            ctypes.c_void_p(source),
            ctypes.c_size_t(self._head_bytes),
            ctypes.c_size_t(length * self._token_bytes),
            ctypes.c_size_t(self._heads),
            ctypes.c_int(_DEVICE_TO_DEVICE),
        )
        cuda.check(code, "cudaMemcpy2D")
