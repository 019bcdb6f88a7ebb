"""Minimal ctypes bindings to the CUDA driver and runtime: devices, free memory, copies, a clock.

The runtime library is the one that ONNX Runtime ships or loads itself.
"""

import ctypes
from typing import Any

from trivium.host_limits import MemoryLimit

_DEVICE_TO_HOST = 2
_DRIVERS = ("libcuda.so.1", "nvcuda.dll")
_RUNTIMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so", "cudart64_13.dll")


class CudaError(RuntimeError):
    """A CUDA driver or runtime call failed, or the library is missing."""


def runtime() -> Any:
    """The CUDA runtime library; raises CudaError if there is none."""
    return _load(_RUNTIMES)


def check(code: int, call: str) -> None:
    """Raises CudaError for any `code` other than success."""
    if code:
        raise CudaError(f"{call} failed with CUDA error {code}")


def _load(names: tuple[str, ...]) -> Any:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError(f"none of {', '.join(names)} was found")


def device_count() -> int:
    """The number of CUDA devices that the driver reports; 0 without a driver."""
    count = ctypes.c_int()
    try:
        driver = _load(_DRIVERS)
        check(driver.cuInit(0), "cuInit")
        check(driver.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    except CudaError:
        return 0
    return count.value


def device_memory() -> MemoryLimit:
    """Total and free memory of the current device, in bytes. Raises CudaError."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    code = runtime().cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    check(code, "cudaMemGetInfo")
    return MemoryLimit(total.value, free.value, "the CUDA device")


def check_device() -> None:
    """Raises CudaError if the device fails every call until the process ends, as it does after an
    illegal memory access or an uncorrectable memory error."""
    check(runtime().cudaDeviceSynchronize(), "cudaDeviceSynchronize")


def copy_to_host(target: int, source: int, size: int) -> None:
    """Copies `size` bytes from a device address to a host address, synchronously."""
    pointers = ctypes.c_void_p(target), ctypes.c_void_p(source)
    kind = ctypes.c_int(_DEVICE_TO_HOST)
    code = runtime().cudaMemcpy(*pointers, ctypes.c_size_t(size), kind)
    check(code, f"cudaMemcpy of {size} bytes")


class CudaClock:
    """Measures device time with CUDA events on `stream`, which it creates."""

    def __init__(self) -> None:
        self._runtime = runtime()
        self.stream = self._create("cudaStreamCreate")
        self._began, self._ended = (self._create("cudaEventCreate") for _ in range(2))

    def start(self) -> None:
        """Begins a measurement."""
        self._record(self._began)

    def stop(self) -> int:
        """Waits for the stream; returns nanoseconds since `start`, with a resolution of 0.5 µs."""
        self._record(self._ended)
        ended = ctypes.c_void_p(self._ended)
        check(self._runtime.cudaEventSynchronize(ended), "cudaEventSynchronize")
        milliseconds = ctypes.c_float()
        code = self._runtime.cudaEventElapsedTime(
            ctypes.byref(milliseconds), ctypes.c_void_p(self._began), ended
        )
        check(code, "cudaEventElapsedTime")
        return round(milliseconds.value * 1e6)

    def _create(self, call: str) -> int:
        handle = ctypes.c_void_p()
        check(getattr(self._runtime, call)(ctypes.byref(handle)), call)
        assert handle.value is not None
        return handle.value

    def _record(self, event: int) -> None:
        pointers = ctypes.c_void_p(event), ctypes.c_void_p(self.stream)
        check(self._runtime.cudaEventRecord(*pointers), "cudaEventRecord")
