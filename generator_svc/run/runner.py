"""Executes plans on the device: owns the model's session and the slots' memory.

Makes no scheduling decisions, and knows nothing about sequences or sampling.
"""

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from generator_svc.device import (
    NO_GRAPH,
    Device,
    DeviceError,
    has_optional_input,
    metadata_of,
    multiplies_bytes_exactly,
    run_options,
    type_of,
)
from generator_svc.graphs import LAST_TOKEN, LOGITS_OF, TOKENS_FROM_END
from generator_svc.plan import Chunk, Copy, PromptBatch, Row, StepPlan, Swap
from generator_svc.run.batch import RunInputs, decode_inputs, prefill_inputs, prompt_inputs
from generator_svc.run.cuda_memory import CudaMemory
from generator_svc.run.fixed_inputs import FixedInputs
from generator_svc.run.logits_buffers import DeviceLogits, HostLogits, Logits
from generator_svc.run.outcome import DeviceInfo, RunResult, StepOutcome
from generator_svc.run.slot_memory import HostMemory, SlotMemory
from generator_svc.sampling.device_row import CANDIDATES
from trivium.model_directory import ModelDirectory

log = logging.getLogger(__name__)

_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

# Decode batch sizes that are captured as CUDA graphs; other batches are padded to the next of them.
CAPTURE_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)

# Cached I/O bindings, by first slot and number of rows: each binds every KV cache tensor.
_MAX_BINDINGS = 1024

# Relative to the largest logit: attention may split its work differently for a longer mask.
_GRAPH_TOLERANCE = 0.02


class OrtRunner:
    """A model on a device, with `slots` slots of `slot_length` tokens.

    With `cuda_graphs`, decode runs are captured as one CUDA graph per size in
    `info.capture_sizes` and replayed, once `capture` has verified that this works. Graphs belong to
    the thread that captured them: call `run` and `capture` on one thread only. `weight_only_gemm`
    as for Device.open. Raises DeviceError.
    """

    def __init__(
        self,
        model: ModelDirectory,
        device: str,
        slots: int,
        slot_length: int,
        threads: int = 0,
        cuda_graphs: bool = False,
        weight_only_gemm: bool = False,
    ) -> None:
        if model.precision == "w8a8":
            _check_integer_products(device)
        self._model = model
        self._device = Device(device)
        self._session, cuda_graphs = self._open(threads, cuda_graphs, weight_only_gemm)
        self._cache_type = _numpy_type(self._session.get_inputs(), model.names.past_key % 0)
        logits_type = _numpy_type(self._session.get_outputs(), model.names.logits)
        self._memory = self._allocate_memory(slots, slot_length)
        # In float32 on CUDA, reusing a binding with a mask of another shape yields wrong logits
        # (ONNX Runtime 1.31.1, docs/log.md).
        self._are_bindings_reused = not (device == "cuda" and self._cache_type is np.float32)
        self._binding = self._make_bindings()
        self._logits = _logits_buffers(self._device, model.vocab_size, logits_type)
        self._row_logits = self._logits.allocate(slots)
        self.info = DeviceInfo(
            provider=self._session.get_providers()[0],
            dtype=np.dtype(self._cache_type).name,
            slots=slots,
            slot_length=slot_length,
            cache_bytes=self._memory.size_in_bytes,
            capture_sizes=capture_sizes(slots) if cuda_graphs else (),
            pads_prompts=metadata_of(self._session).get(LOGITS_OF) == LAST_TOKEN,
            gives_all_logits=has_optional_input(self._session, TOKENS_FROM_END),
        )
        self._fixed_inputs: FixedInputs | None = None

    def reallocate(self, slots: int) -> None:
        """Replaces the slots by `slots` empty ones; to be called before `capture`."""
        self._memory.free()
        self._memory = self._allocate_memory(slots, self.info.slot_length)
        self._binding = self._make_bindings()
        self._row_logits = self._logits.allocate(slots)
        self.info = replace(
            self.info,
            slots=slots,
            cache_bytes=self._memory.size_in_bytes,
            capture_sizes=capture_sizes(slots) if self.info.capture_sizes else (),
        )

    def run(self, plan: StepPlan) -> StepOutcome:
        """Executes a plan. A failed run is reported in its result; only if all further runs would
        fail as well, it raises CudaError."""
        started = time.perf_counter_ns()
        for move in plan.moves:
            self._move(move)
        move_nanoseconds = time.perf_counter_ns() - started if plan.moves else 0
        batches = tuple(self._run_batch(batch) for batch in plan.batches)
        chunks = tuple(self._run_chunk(chunk) for chunk in plan.chunks)
        rows = None
        if plan.rows:  # all steps share one buffer for their logits: valid until the next step
            rows = self._run_rows(plan.rows)
        return StepOutcome(move_nanoseconds, chunks, rows, batches)

    def capture(self, seconds: float) -> int:
        """Captures decode runs as CUDA graphs, smallest batch first; returns nanoseconds spent.

        Sizes not captured within `seconds` are captured on their first run. Does nothing if
        `info.capture_sizes` is empty; a failure disables CUDA graphs with a warning. Raises
        DeviceError if the model cannot be run, CudaError as `run` does. Writes to all slots.
        """
        started = time.perf_counter_ns()
        if not self.info.capture_sizes:
            return 0
        try:
            self._fixed_inputs = FixedInputs(self._device, self.info.slots, self.info.slot_length)
        except Exception as error:  # such as lack of memory
            log.warning("CUDA graphs are disabled: %s", error)
            return time.perf_counter_ns() - started
        if not self._matches_eager_runs():
            log.warning("CUDA graphs are disabled: their logits differ from those of eager runs")
            self._fixed_inputs = None
        for size in self.info.capture_sizes:
            if self._fixed_inputs is None or time.perf_counter_ns() - started > seconds * 1e9:
                break
            self.run(StepPlan(rows=(Row(0, 0),) * size))
        return time.perf_counter_ns() - started

    def _move(self, move: Copy | Swap) -> None:
        if isinstance(move, Copy):
            self._memory.copy(move.source, move.target, move.length)
        else:
            self._memory.swap(move.first, move.second, move.length)

    def _run_batch(self, batch: PromptBatch) -> RunResult:
        inputs = prompt_inputs(batch)
        bind = functools.partial(self._bind_inputs, inputs)
        return self._run(inputs.first_slot, list(batch.temperatures), bind, None)

    def _run_chunk(self, chunk: Chunk) -> RunResult:
        if chunk.wants_all_logits:
            return self._run_for_all_logits(chunk)
        inputs = prefill_inputs(chunk)
        bind = functools.partial(self._bind_inputs, inputs)
        return self._run(inputs.first_slot, [chunk.temperature], bind, None, chunk.wants_logits)

    def _run_for_all_logits(self, chunk: Chunk) -> RunResult:
        """Runs a chunk and copies the logits of every token to the host."""
        inputs, tokens = prefill_inputs(chunk), len(chunk.token_ids)
        started = time.perf_counter_ns()
        try:
            # A binding of its own, as the cached ones must not have this input bound.
            binding = self._create_binding(inputs.first_slot, 1)
            from_end = np.arange(tokens, 0, -1, dtype=np.int64)
            # By address, as bind_cpu_input does not support inputs with defaults.
            place = "cpu", 0, np.int64, from_end.shape, from_end.ctypes.data
            binding.bind_input(TOKENS_FROM_END, *place)
            # Allocated by the runtime, which rejects a buffer larger than the graph declares.
            binding.bind_output(self._model.names.logits, "cpu")
            self._device.clock.start()
            self._bind_inputs(inputs, binding)
            self._session.run_with_iobinding(binding, run_options())
            nanoseconds = self._device.clock.stop()
            logits = binding.get_outputs()[-1].numpy()[0].astype(np.float32)
            last = logits[-1:].copy() if chunk.wants_logits else None
            return RunResult(nanoseconds, last, all_logits=logits)
        except Exception as error:  # an error of the runtime fails this run, not the engine
            self._device.check()
            return RunResult(time.perf_counter_ns() - started, error=error)

    def _run_rows(self, rows: tuple[Row, ...]) -> RunResult:
        count, wasted = len(rows), 0
        temperatures = [None if row.is_idle else row.temperature for row in rows]
        if self._fixed_inputs is not None and count in self.info.capture_sizes:
            bind = functools.partial(self._bind_fixed_inputs, self._fixed_inputs, rows)
            result = self._run(0, temperatures, bind, self._row_logits, graph=count)
            if result.error is None:
                return result
            log.warning("CUDA graphs are disabled: %s", result.error)
            self._fixed_inputs, wasted = None, result.nanoseconds
        bind = functools.partial(self._bind_inputs, decode_inputs(rows))
        result = self._run(0, temperatures, bind, self._row_logits)
        return replace(result, nanoseconds=wasted + result.nanoseconds)

    def _run(
        self,
        first_slot: int,
        temperatures: list[float | None],
        bind_inputs: Callable[[Any], None],
        logits_buffer: Any,
        wants_logits: bool = True,
        graph: int = NO_GRAPH,
    ) -> RunResult:
        """One run over consecutive slots from `first_slot`, one for each of `temperatures`.

        `logits_buffer` receives the logits; None allocates one. `graph` is the number of the CUDA
        graph to replay, or to capture if it does not exist yet.
        """
        started, rows = time.perf_counter_ns(), len(temperatures)
        try:
            buffer = self._logits.allocate(rows) if logits_buffer is None else logits_buffer
            binding = self._binding(first_slot, rows)
            binding.bind_output(self._model.names.logits, *self._logits.tensor_ref(buffer, rows))
            self._device.clock.start()
            bind_inputs(binding)
            options = run_options(graph, synchronize=self._logits.is_on_host)
            self._session.run_with_iobinding(binding, options)
            logits = self._logits.read(buffer, temperatures) if wants_logits else None
            return RunResult(self._device.clock.stop(), logits)
        except Exception as error:  # an error of the runtime fails this run, not the engine
            if graph == NO_GRAPH:  # the check itself may fail after a failed capture
                self._device.check()
            return RunResult(time.perf_counter_ns() - started, error=error)

    def _bind_inputs(self, inputs: RunInputs, binding: Any) -> None:
        names = self._model.names
        binding.bind_cpu_input(names.input_ids, inputs.input_ids)
        binding.bind_cpu_input(names.attention_mask, inputs.attention_mask)

    def _bind_fixed_inputs(self, inputs: FixedInputs, rows: tuple[Row, ...], binding: Any) -> None:
        ids, mask = inputs.write(rows)
        binding.bind_input(self._model.names.input_ids, *ids)
        binding.bind_input(self._model.names.attention_mask, *mask)

    def _allocate_memory(self, slots: int, slot_length: int) -> SlotMemory:
        tensors = 2 * self._model.num_layers
        shape = (slots, self._model.num_kv_heads, slot_length, self._model.head_size)
        if self._device.name == "cpu":
            return HostMemory(tensors, shape, self._cache_type)
        return CudaMemory(tensors, shape, self._cache_type)

    def _open(self, threads: int, cuda_graphs: bool, weight_only_gemm: bool) -> tuple[Any, bool]:
        """A session, and whether its runs can be captured as CUDA graphs. Raises DeviceError."""
        if cuda_graphs:
            try:
                graph = self._model.graph
                return self._device.open(graph, threads, True, weight_only_gemm), True
            except DeviceError as error:  # for example, some operators run on the CPU
                log.warning("CUDA graphs are disabled: %s", error)
        return self._device.open(self._model.graph, threads, False, weight_only_gemm), False

    def _matches_eager_runs(self) -> bool:
        """Whether the CUDA graph of one row, replayed with other tokens, matches eager runs."""
        plans = [StepPlan(rows=(Row(token, position),)) for position, token in enumerate((0, 1, 0))]
        inputs, self._fixed_inputs = self._fixed_inputs, None
        eager = [self._checked_logits(plan) for plan in plans]
        self._fixed_inputs = inputs
        return all(
            np.allclose(
                expected,
                self._checked_logits(plan),
                rtol=0,
                atol=_GRAPH_TOLERANCE * np.abs(expected).max(),
            )
            for plan, expected in zip(plans, eager, strict=True)
        )

    def _checked_logits(self, plan: StepPlan) -> Logits:
        """The logits of a plan with one row, float32 [vocabulary]; raises DeviceError."""
        result = self.run(plan).rows
        assert result is not None
        if result.logits is None:
            raise DeviceError(f"running the model failed: {result.error}") from result.error
        return np.array(result.logits[0])

    def _make_bindings(self) -> Callable[[int, int], Any]:
        """A function from first slot and row count to an I/O binding of the current memory."""
        if not self._are_bindings_reused:
            return self._create_binding
        # Binding all cache tensors again may take longer than a step.
        return functools.lru_cache(_MAX_BINDINGS)(self._create_binding)

    def _create_binding(self, first_slot: int, rows: int) -> Any:
        """An I/O binding of all KV cache tensors for a run over `rows` slots from `first_slot`."""
        binding = self._session.io_binding()
        names = self._model.names
        shape = (rows, *self._memory.shape[1:])
        for layer in range(self._model.num_layers):
            for past, present, tensor in (
                (names.past_key, names.present_key, 2 * layer),
                (names.past_value, names.present_value, 2 * layer + 1),
            ):
                address = self._memory.address(tensor, first_slot)
                ref = self._device.tensor_ref(self._memory.dtype, shape, address)
                binding.bind_input(past % layer, *ref)
                binding.bind_output(present % layer, *ref)
        return binding


def capture_sizes(slots: int) -> tuple[int, ...]:
    """The batch sizes to capture for `slots` slots, ascending."""
    return (*(size for size in CAPTURE_SIZES if size < slots), slots)


def _numpy_type(nodes: list[Any], name: str) -> Any:
    """The element type of the input or output `name`; raises DeviceError if it is not supported."""
    found = type_of(nodes, name)
    if found not in _NUMPY_TYPES:
        supported = " and ".join(_NUMPY_TYPES)
        raise DeviceError(f"{name!r} of the graph is a {found}; supported are {supported}")
    return _NUMPY_TYPES[found]


def _check_integer_products(device: str) -> None:
    if device != "cpu":
        raise DeviceError("a model of precision w8a8 runs on the CPU only")
    if not multiplies_bytes_exactly():
        raise DeviceError(
            "a model of precision w8a8 needs a processor with exact int8 products (on x86: "
            "VNNI), which this one lacks; export it with precision int8"
        )


def _logits_buffers(device: Device, vocabulary: int, dtype: Any) -> HostLogits | DeviceLogits:
    """Logits on the CUDA device if they are float32 and top-k works there, else on the host."""
    if device.name == "cuda" and dtype is np.float32 and vocabulary >= CANDIDATES:
        try:
            logits = DeviceLogits(device, vocabulary)
            logits.check()
            return logits
        except Exception as error:  # of the runtime's own types, for example a missing kernel
            log.warning(
                "top-k on the device is unavailable, so all logits are copied to the host: %s",
                error,
            )
    return HostLogits(vocabulary, dtype)
