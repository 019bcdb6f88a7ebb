"""The only door to ONNX Runtime: a session, the slots' memory, and runs over them.

Carries out plans; decides nothing, and knows nothing about sequences or sampling.
"""

import ctypes
import functools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from generator_svc.batch import RunInputs, decode_inputs, prefill_inputs
from generator_svc.cuda_memory import CudaClock, CudaError, CudaMemory, copy_to_host, device_count
from generator_svc.device_row import CANDIDATES, GRAPH, DeviceRow
from generator_svc.integer_products import are_exact
from generator_svc.logits_memory import DeviceLogits, HostLogits, Logits
from generator_svc.plan import Chunk, Copy, StepPlan, Swap
from generator_svc.slot_memory import HostMemory, SlotMemory
from trivium.model_directory import ModelDirectory

log = logging.getLogger(__name__)

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


# How long an idle thread of the runtime waits busily for its next operator: long enough for the
# gaps within a run, short enough to leave the core to the other services between runs. With none,
# one sequence decodes a third slower; with the default, which is far longer, everything takes up
# to half as long again as soon as others want a core (docs/log.md).
_SPIN_MICROSECONDS = "50"


class DeviceError(RuntimeError):
    """The device that was asked for cannot be used."""


@dataclass(frozen=True)
class RunResult:
    """One run: its device time, and either its logits, float32 [rows, vocabulary], or its error.

    Logits that stay on the device are a DeviceRow for each row.
    """

    nanoseconds: int
    logits: Logits | tuple[DeviceRow, ...] | None = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Outcome:
    """What a plan brought: a result for each chunk, one for the rows, if there were any."""

    move_nanoseconds: int = 0
    chunks: tuple[RunResult, ...] = ()
    rows: RunResult | None = None


class Runner(Protocol):
    """What the engine needs of a device."""

    def run(self, plan: StepPlan) -> Outcome:
        """Carries out a plan. A run that fails is reported in its result, never raised."""


@dataclass(frozen=True)
class DeviceInfo:
    """What is really in use."""

    provider: str
    dtype: str
    slots: int
    slot_length: int
    cache_bytes: int


@dataclass
class _Bindings:
    """I/O bindings by first slot and row count, since binding a cache takes longer than a step."""

    create: Callable[[int, int], Any]
    known: dict[tuple[int, int], Any] = field(default_factory=dict)

    def get(self, first_slot: int, rows: int) -> Any:
        key = (first_slot, rows)
        if key not in self.known:
            self.known[key] = self.create(first_slot, rows)
        return self.known[key]


def choose_device(wanted: str) -> str:
    """`auto`, `cpu` or `cuda` to `cpu` or `cuda`; DeviceError when CUDA is wanted and absent."""
    assert wanted in ("auto", "cpu", "cuda")
    if wanted == "cpu":
        return "cpu"
    works = _PROVIDERS["cuda"] in ort.get_available_providers() and device_count() > 0
    if works:  # before anybody asks the CUDA runtime how much memory is free
        ort.preload_dlls()
    if wanted == "cuda" and not works:
        raise DeviceError("device cuda was asked for, and no CUDA device or library was found")
    return "cuda" if works else "cpu"


class OrtRunner:
    """A model on a device, with `slots` slots of `slot_length` tokens."""

    def __init__(
        self, model: ModelDirectory, device: str, slots: int, slot_length: int, threads: int = 0
    ) -> None:
        if model.precision == "w8a8":
            _check_integer_products(device)
        self._model = model
        self._clock = _start_clock(device)
        self._session = _open_session(model.graph, device, threads, self._clock)
        self._device = device
        cache_type = _NUMPY_TYPES[_input_type(self._session, model.names.past_key % 0)]
        logits_type = _NUMPY_TYPES[_output_type(self._session, model.names.logits)]
        shape = (slots, model.num_kv_heads, slot_length, model.head_size)
        self._memory = _allocate(device, 2 * model.num_layers, shape, cache_type)
        self._bindings = _Bindings(self._create_binding)
        self._logits = _logits_memory(device, model.vocab_size, logits_type, self._clock)
        self._row_logits = self._logits.reserve(slots)
        self.info = DeviceInfo(
            provider=self._session.get_providers()[0],
            dtype=np.dtype(cache_type).name,
            slots=slots,
            slot_length=slot_length,
            cache_bytes=self._memory.size_in_bytes,
        )

    def run(self, plan: StepPlan) -> Outcome:
        """Carries out a plan. A run that fails is reported in its result, never raised."""
        started = time.perf_counter_ns()
        for move in plan.moves:
            self._move(move)
        move_nanoseconds = time.perf_counter_ns() - started if plan.moves else 0
        chunks = tuple(self._run_chunk(chunk) for chunk in plan.chunks)
        rows = None
        if plan.rows:  # their logits live until the next step
            rows = self._run(decode_inputs(plan.rows), self._row_logits)
        return Outcome(move_nanoseconds, chunks, rows)

    def _move(self, move: Copy | Swap) -> None:
        if isinstance(move, Copy):
            self._memory.copy(move.source, move.target, move.length)
        else:
            self._memory.swap(move.first, move.second, move.length)

    def _run_chunk(self, chunk: Chunk) -> RunResult:
        return self._run(prefill_inputs(chunk), None, chunk.wants_logits)

    def _run(self, inputs: RunInputs, room: Any, wants_logits: bool = True) -> RunResult:
        """One run; `room` takes its logits, and None stands for room of their own."""
        names = self._model.names
        started = time.perf_counter_ns()
        try:
            room = self._logits.reserve(inputs.rows) if room is None else room
            binding = self._bindings.get(inputs.first_slot, inputs.rows)
            binding.bind_cpu_input(names.input_ids, inputs.input_ids)
            binding.bind_cpu_input(names.attention_mask, inputs.attention_mask)
            binding.bind_output(names.logits, *self._logits.place(room, inputs.rows))
            self._clock.start()
            self._session.run_with_iobinding(binding)
            logits = self._logits.read(room, inputs.rows) if wants_logits else None
            return RunResult(self._clock.stop(), logits)
        except Exception as error:  # whatever the runtime raises ends this run, not the engine
            return RunResult(time.perf_counter_ns() - started, error=error)

    def _create_binding(self, first_slot: int, rows: int) -> Any:
        binding = self._session.io_binding()
        names = self._model.names
        shape = (rows, *self._memory.shape[1:])
        for layer in range(self._model.num_layers):
            for past, present, tensor in (
                (names.past_key, names.present_key, 2 * layer),
                (names.past_value, names.present_value, 2 * layer + 1),
            ):
                address = self._memory.address(tensor, first_slot)
                place = (self._device, 0, self._memory.dtype, shape, address)
                binding.bind_input(past % layer, *place)
                binding.bind_output(present % layer, *place)
        return binding


def _check_integer_products(device: str) -> None:
    if device != "cpu":
        raise DeviceError("a model of precision w8a8 runs on the CPU alone")
    if not are_exact():
        raise DeviceError(
            "this processor does not multiply bytes exactly, which a model of precision w8a8 "
            "needs; export it with precision int8"
        )


class _HostClock:
    """Time on the host, for a device that the host is, or waits for."""

    def start(self) -> None:
        self._started = time.perf_counter_ns()

    def stop(self) -> int:
        """Nanoseconds since `start`."""
        return time.perf_counter_ns() - self._started


def _start_clock(device: str) -> _HostClock | CudaClock:
    """The device's own clock where it works."""
    if device == "cuda":
        try:
            clock = CudaClock()
            clock.start()
            clock.stop()
            return clock
        except (CudaError, AttributeError) as error:
            log.warning("the device's time is taken on the host: %s", error)
    return _HostClock()


def _logits_memory(
    device: str, vocabulary: int, dtype: Any, clock: _HostClock | CudaClock
) -> HostLogits | DeviceLogits:
    """On the CUDA device where they are float32 and it picks candidates as it should."""
    if device == "cuda" and dtype is np.float32 and vocabulary >= CANDIDATES:
        try:
            logits = _device_logits(device, vocabulary, clock)
            logits.check()
            return logits
        except Exception as error:  # of the runtime's own types: a kernel is missing, for one
            log.warning("all logits are brought to the host: %s", error)
    return HostLogits(vocabulary, dtype)


def _device_logits(device: str, vocabulary: int, clock: _HostClock | CudaClock) -> DeviceLogits:
    session = _open_session(GRAPH, device, 1, clock)
    reserve = functools.partial(
        ort.OrtValue.ortvalue_from_shape_and_type,
        element_type=np.float32,
        device_type=device,
    )
    copy = ctypes.memmove if device == "cpu" else copy_to_host
    return DeviceLogits(vocabulary, device, session, reserve, copy)


def _open_session(
    graph: Path, device: str, threads: int, clock: _HostClock | CudaClock
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or _physical_cores()
    options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_MICROSECONDS)
    providers: list[Any] = [_PROVIDERS["cpu"]]
    if device == "cuda":
        stream = {"user_compute_stream": str(clock.stream)} if isinstance(clock, CudaClock) else {}
        providers.insert(0, (_PROVIDERS["cuda"], stream))
    try:
        session = ort.InferenceSession(str(graph), options, providers=providers)
    except Exception as error:
        raise DeviceError(f"{graph}: ONNX Runtime cannot load it: {error}") from error
    if session.get_providers()[0] != _PROVIDERS[device]:
        raise DeviceError(f"the {_PROVIDERS[device]} did not start; see its log above")
    return session


def _physical_cores() -> int:
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)


def _allocate(
    device: str, tensors: int, shape: tuple[int, int, int, int], dtype: npt.DTypeLike
) -> SlotMemory:
    if device == "cpu":
        return HostMemory(tensors, shape, dtype)
    return CudaMemory(tensors, shape, dtype)


def _input_type(session: ort.InferenceSession, name: str) -> str:
    return _type_of(session.get_inputs(), name)


def _output_type(session: ort.InferenceSession, name: str) -> str:
    return _type_of(session.get_outputs(), name)


def _type_of(nodes: list[Any], name: str) -> str:
    for node in nodes:
        if node.name == name:
            return str(node.type)
    raise DeviceError(f"the graph has no {name!r}; its nodes are {[n.name for n in nodes]}")
