"""A fake CUDA device made of main memory, the host's clock and ONNX Runtime's CPU provider.

All of our code runs as on a device; kernels are the CPU's, and no graph is captured.
"""

import contextlib
import ctypes
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import onnxruntime
import pytest

from generator_svc.device import Device, why_not_cuda

_MEMORY_BYTES = 4 * 2**30


class FakeCudaRuntime:
    """The functions of the CUDA driver and runtime that we call, on main memory.

    `calls` records copies to the host and timing calls, whose nanoseconds come from `now`. `fault`
    is the error code of all calls that wait for the device.
    """

    fault = 0

    def __init__(self, now: Callable[[], int] = time.perf_counter_ns) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._now = now
        self._memory: dict[int, Any] = {}
        self._handles = itertools.count(2**40)
        self._recorded: dict[int, int] = {}  # by event

    def cuInit(self, flags):
        return 0

    def cuDeviceGetCount(self, count):
        count._obj.value = 1
        return 0

    def cudaMemGetInfo(self, free, total):
        total._obj.value = _MEMORY_BYTES
        free._obj.value = _MEMORY_BYTES - sum(map(len, self._memory.values()))
        return 0

    def cudaMalloc(self, address, size):
        allocated = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(allocated)
        self._memory[address._obj.value] = allocated
        return 0

    def cudaFree(self, address):
        del self._memory[address.value]
        return 0

    def cudaMemset(self, address, value, size):
        ctypes.memset(address.value, value.value, size.value)
        return 0

    def cudaMemcpy(self, target, source, size, kind):
        self.calls.append(("copy", kind.value))
        ctypes.memmove(target.value, source.value, size.value)
        return 0

    def cudaMemcpy2D(self, target, target_pitch, source, source_pitch, width, height, kind):
        assert kind.value == 3
        for row in range(height.value):
            to, of = row * target_pitch.value, row * source_pitch.value
            ctypes.memmove(target.value + to, source.value + of, width.value)
        return 0

    def cudaDeviceSynchronize(self):
        return self.fault

    def cudaStreamCreate(self, handle):
        handle._obj.value = next(self._handles)
        return 0

    cudaEventCreate = cudaStreamCreate

    def cudaEventRecord(self, event, stream):
        self.calls.append(("record", event.value, stream.value))
        self._recorded[event.value] = self._now()
        return 0

    def cudaEventSynchronize(self, event):
        self.calls.append(("wait", event.value))
        return self.fault

    def cudaEventElapsedTime(self, milliseconds, began, ended):
        self.calls.append(("time", began.value, ended.value))
        nanoseconds = self._recorded[ended.value] - self._recorded[began.value]
        milliseconds._obj.value = nanoseconds / 1e6
        return 0


class _Session(onnxruntime.InferenceSession):
    """A session that reports the requested providers, but runs on the CPU."""

    def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
        self._asked_for = [name if isinstance(name, str) else name[0] for name in providers]
        super().__init__(path, options, providers=["CPUExecutionProvider"])

    def get_providers(self) -> list[str]:
        return self._asked_for


@contextlib.contextmanager
def fake_cuda_runtime(now: Callable[[], int] = time.perf_counter_ns) -> Iterator[FakeCudaRuntime]:
    """Makes ctypes load a FakeCudaRuntime, whatever the library."""
    runtime = FakeCudaRuntime(now)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda name: runtime)
        yield runtime


@contextlib.contextmanager
def fake_cuda_device() -> Iterator[FakeCudaRuntime]:
    """Makes a device `cuda` available, with all that it needs."""
    with fake_cuda_runtime() as runtime, pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "preload_dlls", lambda: None)
        patch.setattr(onnxruntime, "InferenceSession", _Session)
        for method in (Device.tensor, Device.tensor_ref):
            on_host = staticmethod(functools.partial(method, Device("cpu")))
            patch.setattr(Device, method.__name__, on_host)
        why_not_cuda.cache_clear()
        yield runtime
    why_not_cuda.cache_clear()
