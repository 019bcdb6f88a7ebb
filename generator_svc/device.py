"""The only importer of ONNX Runtime: the device, its clock, its sessions and its tensors."""

import contextlib
import ctypes
import functools
import io
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from generator_svc.cuda import CudaClock, CudaError, check_device, copy_to_host, device_count
from generator_svc.graphs import BYTE_PRODUCT
from trivium.cuda_libraries import missing_libraries
from trivium.host_limits import cpu_limit

log = logging.getLogger(__name__)

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

# How long an idle ORT intra-op thread spins before it sleeps: long enough for the gaps within a
# run, short enough to leave the core to the other services between runs. Without spinning, a single
# sequence decodes a third slower; with the default, which is far longer, everything takes up to 1.5
# times as long when other processes need a core (docs/log.md).
_SPIN_MICROSECONDS = "50"

_FLASH_ATTENTION = "1"  # a value of the provider option sdpa_kernel

# Weight-only GEMM (fpA_intB): kernels that multiply float16 activations by symmetric 4 or 8-bit
# weights in blocks of 32, which they dequantise on the fly. When the session is created, they are
# profiled for each weight shape and these row counts; a count in between uses the profile of the
# next one, a larger one is profiled on its first run.
_WEIGHT_ONLY_GEMM = {
    "ep.cuda.fpa_intb_gemm": "1",
    "ep.cuda.fpa_intb_profile_m": "1,2,4,8,16,32,64,128,256,512",
}

# Arguments of an OrtValue binding: device name, device number, element type, shape, address.
TensorRef = tuple[str, int, Any, tuple[int, ...], int]

NO_GRAPH = -1  # the gpu_graph_id of a run that is not captured


class DeviceError(RuntimeError):
    """The requested device cannot be used, or the model cannot run on it."""


def choose_device(requested: str) -> str:
    """Resolves `auto`, `cpu` or `cuda`; raises DeviceError if `cuda` is unavailable."""
    assert requested in ("auto", "cpu", "cuda")
    if requested == "cpu":
        return "cpu"
    reason = why_not_cuda()
    if requested == "cuda" and reason:
        raise DeviceError(f"device cuda is unavailable: {reason}")
    return "cpu" if reason else "cuda"


@functools.cache
def why_not_cuda() -> str:
    """Why CUDA cannot be used here; empty if it can, as far as is known without a session."""
    if _PROVIDERS["cuda"] not in ort.get_available_providers():
        return "this build of ONNX Runtime has no CUDA provider"
    if not device_count():
        return "no CUDA device found"
    # Loads the CUDA libraries that pip installed; querying free memory needs them too.
    with contextlib.redirect_stdout(io.StringIO()):  # it prints failures and where to read on
        ort.preload_dlls()
    return missing_libraries()


class HostClock:
    """Wall-clock time: for the CPU, and for CUDA where events do not work."""

    def start(self) -> None:
        """Begins a measurement."""
        self._started = time.perf_counter_ns()

    def stop(self) -> int:
        """Nanoseconds since `start`."""
        return time.perf_counter_ns() - self._started


class Device:
    """The CPU (`cpu`) or the first CUDA device (`cuda`)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock = _start_clock(name)

    def open(
        self,
        graph: Path,
        threads: int = 1,
        cuda_graphs: bool = False,
        weight_only_gemm: bool = False,
    ) -> Any:
        """An inference session for a graph file. Raises DeviceError.

        `threads` is the number of intra-op threads on the CPU, 0 for one per usable core; on CUDA
        the host only launches kernels. With `cuda_graphs`, runs with a graph number are captured
        as CUDA graphs and replayed. With `weight_only_gemm`, CUDA uses weight-only GEMM kernels for
        quantised weights without zero points, which makes loading slower.
        """
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_MICROSECONDS)
        providers: list[Any] = [_PROVIDERS["cpu"]]
        if self.name == "cuda":
            providers.insert(0, (_PROVIDERS["cuda"], self._cuda_options(cuda_graphs)))
            options.intra_op_num_threads = 1  # more would only spin
            # Frees the original weights once a kernel has repacked them.
            entry = "session.use_device_allocator_for_initializers"
            options.add_session_config_entry(entry, "1")
            for entry, value in _WEIGHT_ONLY_GEMM.items() if weight_only_gemm else ():
                options.add_session_config_entry(entry, value)
        else:
            options.intra_op_num_threads = threads or cpu_limit().cores
        try:
            session = ort.InferenceSession(str(graph), options, providers=providers)
        except Exception as error:
            raise DeviceError(f"{graph}: ONNX Runtime cannot load the graph: {error}") from error
        if session.get_providers()[0] != _PROVIDERS[self.name]:
            raise DeviceError(
                f"the {_PROVIDERS[self.name]} failed to initialise; see ONNX Runtime's log above"
            )
        return session

    def tensor(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """An uninitialised tensor on the device, as an OrtValue, freed with its last reference."""
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self.name)

    def tensor_ref(self, dtype: Any, shape: tuple[int, ...], address: int) -> TensorRef:
        """A tensor at `address` on the device, as arguments of an I/O binding."""
        return self.name, 0, dtype, shape, address

    def copy_to_host(self, target: int, source: int, size: int) -> None:
        """Copies `size` bytes from a device address to a host address."""
        if self.name == "cuda":
            copy_to_host(target, source, size)
        else:
            ctypes.memmove(target, source, size)

    def check(self) -> None:
        """Raises CudaError if no run can succeed any more in this process."""
        if self.name == "cuda":
            check_device()

    def _cuda_options(self, cuda_graphs: bool) -> dict[str, str]:
        # FlashAttention for prefill: the default, cuDNN, stalls for up to 92 ms while it plans each
        # new prompt length, FlashAttention for up to 22 ms (docs/log.md). Decode is not affected.
        # The arena grows by what a run needs, not to the next power of two: slots need that memory.
        options = {"sdpa_kernel": _FLASH_ATTENTION, "arena_extend_strategy": "kSameAsRequested"}
        if cuda_graphs:
            options["enable_cuda_graph"] = "1"
        if isinstance(self.clock, CudaClock):
            options["user_compute_stream"] = str(self.clock.stream)
        return options


@functools.cache
def run_options(graph: int = NO_GRAPH, synchronize: bool = True) -> Any:
    """Options for a run that captures or replays CUDA graph number `graph`, or an eager run.

    Without `synchronize`, the host does not wait for the device: outputs may be read only by a
    later run on the device, or after `Device.clock.stop`.
    """
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    if not synchronize:
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def metadata_of(session: Any) -> dict[str, str]:
    """The metadata of a session's graph file."""
    metadata: dict[str, str] = session.get_modelmeta().custom_metadata_map
    return metadata


def has_optional_input(session: Any, name: str) -> bool:
    """Whether a session's graph has an input of this name with a default value."""
    return any(value.name == name for value in session.get_overridable_initializers())


def multiplies_bytes_exactly() -> bool:
    """Whether this processor computes int8 matrix products exactly, as precision w8a8 requires.

    On x86 processors with AVX2 or AVX-512 but without VNNI, ONNX Runtime uses an instruction that
    adds two products of unsigned and signed bytes in 16 bits, which saturates (its quantisation
    guide recommends 7-bit weights there). The sum computed here is the largest possible sum of
    eight products.
    """
    largest = np.full((1, 8), 255, np.uint8)
    (product,) = Device("cpu").open(BYTE_PRODUCT).run(None, {"a": largest})
    return int(product[0, 0]) == 8 * 255 * 127


def type_of(nodes: list[Any], name: str) -> str:
    """The element type of the input or output `name`; raises DeviceError if there is none."""
    for node in nodes:
        if node.name == name:
            return str(node.type)
    raise DeviceError(
        f"the graph has no input or output {name!r}; it has {[n.name for n in nodes]}"
    )


def _start_clock(device: str) -> HostClock | CudaClock:
    """CUDA events if they work, else the host's clock."""
    if device == "cuda":
        try:
            clock = CudaClock()
            clock.start()
            clock.stop()
            return clock
        except (CudaError, AttributeError) as error:
            log.warning(
                "CUDA events are unavailable, so device time is measured on the host: %s", error
            )
    return HostClock()
