"""CUDA without a framework: how many devices there are, and memory and time on the first.

Calls the driver and the runtime library that ONNX Runtime brings or loads.
"""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from generator_svc.slot_memory import Shape

_DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 2, 3
_DRIVERS = ("libcuda.so.1", "nvcuda.dll")
_RUNTIMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so", "cudart64_13.dll")


class CudaError(RuntimeError):
    """A call of the CUDA runtime failed."""


def _load(names: tuple[str, ...]) -> Any:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError(f"none of {', '.join(names)} was found")


def _check(code: int, call: str) -> None:
    if code:
        raise CudaError(f"{call} failed with CUDA error {code}")


def device_count() -> int:
    """CUDA devices that the driver shows; 0 without a driver."""
    count = ctypes.c_int()
    try:
        driver = _load(_DRIVERS)
        _check(driver.cuInit(0), "cuInit")
        _check(driver.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    except CudaError:
        return 0
    return count.value


def free_bytes() -> int:
    """Free memory of the current device."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    code = _load(_RUNTIMES).cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    _check(code, "cudaMemGetInfo")
    return free.value


def copy_to_host(target: int, source: int, size: int) -> None:
    """Copies `size` bytes from an address on the device to one of the host, and waits for it."""
    pointers = ctypes.c_void_p(target), ctypes.c_void_p(source)
    kind = ctypes.c_int(_DEVICE_TO_HOST)
    code = _load(_RUNTIMES).cudaMemcpy(*pointers, ctypes.c_size_t(size), kind)
    _check(code, f"cudaMemcpy of {size} bytes")


class CudaClock:
    """The time that the device takes for what is done on `stream`, a stream of its own."""

    def __init__(self) -> None:
        self._runtime = _load(_RUNTIMES)
        self.stream = self._create("cudaStreamCreate")
        self._began, self._ended = (self._create("cudaEventCreate") for _ in range(2))

    def start(self) -> None:
        self._record(self._began)

    def stop(self) -> int:
        """Waits until the stream is done; nanoseconds since `start`, to half a microsecond."""
        self._record(self._ended)
        ended = ctypes.c_void_p(self._ended)
        _check(self._runtime.cudaEventSynchronize(ended), "cudaEventSynchronize")
        milliseconds = ctypes.c_float()
        code = self._runtime.cudaEventElapsedTime(
            ctypes.byref(milliseconds), ctypes.c_void_p(self._began), ended
        )
        _check(code, "cudaEventElapsedTime")
        return round(milliseconds.value * 1e6)

    def _create(self, call: str) -> int:
        handle = ctypes.c_void_p()
        _check(getattr(self._runtime, call)(ctypes.byref(handle)), call)
        assert handle.value is not None
        return handle.value

    def _record(self, event: int) -> None:
        pointers = ctypes.c_void_p(event), ctypes.c_void_p(self.stream)
        _check(self._runtime.cudaEventRecord(*pointers), "cudaEventRecord")


class CudaMemory:
    """Slots in device memory, held until the process ends; see SlotMemory."""

    def __init__(self, tensors: int, shape: Shape, dtype: npt.DTypeLike) -> None:
        self.shape = shape
        self.dtype = dtype
        self._runtime = _load(_RUNTIMES)
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
        _check(self._runtime.cudaDeviceSynchronize(), "cudaDeviceSynchronize")

    def swap(self, first: int, second: int, length: int) -> None:
        for tensor in range(len(self._tensors)):
            one, other = self.address(tensor, first), self.address(tensor, second)
            self._copy(one, self._spare, length)
            self._copy(other, one, length)
            self._copy(self._spare, other, length)
        _check(self._runtime.cudaDeviceSynchronize(), "cudaDeviceSynchronize")

    def _allocate(self, size: int) -> int:
        address = ctypes.c_void_p()
        code = self._runtime.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(size))
        _check(code, f"cudaMalloc of {size} bytes")
        code = self._runtime.cudaMemset(address, ctypes.c_int(0), ctypes.c_size_t(size))
        _check(code, "cudaMemset")
        assert address.value is not None
        return address.value

    def _copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of every head: a strided block."""
        code = self._runtime.cudaMemcpy2D(
            ctypes.c_void_p(target),
            ctypes.c_size_t(self._head_bytes),
            ctypes.c_void_p(source),
            ctypes.c_size_t(self._head_bytes),
            ctypes.c_size_t(length * self._token_bytes),
            ctypes.c_size_t(self._heads),
            ctypes.c_int(_DEVICE_TO_DEVICE),
        )
        _check(code, "cudaMemcpy2D")
