"""How much of the machine a model gets: threads, KV cache bytes, number and length of slots.

Planned before anything is loaded, from the sizes of the model's files and the free memory.
"""

import logging
import math
from dataclasses import dataclass, replace

from generator_svc.config import GeneratorSettings
from generator_svc.cuda import device_memory
from trivium.host_limits import MemoryLimit, memory_limit
from trivium.model_directory import ModelDirectory

log = logging.getLogger(__name__)

_SLOT_GRANULARITY = 8
_MEBIBYTE = 2**20

# Up to 16 threads slow no model down: one of 250 MiB decodes fastest with 8 to 12 and prefills
# fastest with 16. Beyond that, a thread has to read enough weights to make up for the cost of
# synchronisation: a model of 2,330 MiB still gains a tenth from 12 to 16 threads, at 146 MiB per
# thread (docs/log.md).
_DEFAULT_MAX_THREADS = 16
_WEIGHT_BYTES_PER_THREAD = 64 * _MEBIBYTE

# Besides weights and KV cache: activations, masks, responses, and the process that compiles
# untrusted constraints.
_WORKING_BYTES = 272 * _MEBIBYTE

# CPU kernels repack weights into a layout of their own, as copies that replace the memory-mapped
# file tensor by tensor. Quantised weights grow by one float per block of 32: its sum, in addition
# to its scale. Upper bounds relative to the file's size: embeddings and norms are not repacked.
_PACKING_GROWTH = {"int4": 4 / (16 + 4), "int8": 4 / (32 + 4)}

# Approximate bits per weight in the file, scales included.
_WEIGHT_BITS = {"fp32": 32, "fp16": 16, "int8": 9, "w8a8": 9, "int4": 5}

# Memory of the CUDA graphs of all batch sizes, for a model with 8 billion weights (docs/log.md).
CUDA_GRAPH_BYTES = 2**30

_MIN_DEFAULT_LENGTH = 256  # tokens; slots are not shortened below this, nor is it suggested


class MemoryPlanError(ValueError):
    """Not even one slot fits into memory, or the model's context is too short for one.

    `needed_bytes` is how much memory the model would need, 0 if memory is not the reason.
    """

    def __init__(self, message: str, needed_bytes: int = 0) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


def plan_threads(cores: int, weight_bytes: int) -> int:
    """Default number of threads for a run on the CPU, at most one per core."""
    return min(cores, max(_DEFAULT_MAX_THREADS, weight_bytes // _WEIGHT_BYTES_PER_THREAD))


@dataclass(frozen=True)
class MemoryPlan:
    """`slots` slots of `slot_length` tokens, `slot_bytes` each.

    `needed_bytes` is what a single slot, the weights and everything else take of `memory`.
    """

    slots: int
    slot_length: int
    slot_bytes: int
    weight_bytes: int
    needed_bytes: int
    memory: MemoryLimit

    def __str__(self) -> str:
        memory, sequences = self.memory, f"{self.slots} sequence{'s' if self.slots > 1 else ''}"
        return (
            f"{_mebibytes(self.weight_bytes)} of weights, up to "
            f"{_mebibytes(self.slots * self.slot_bytes)} of KV cache for {sequences} of "
            f"{self.slot_length:,} tokens; {_mebibytes(memory.free)} of "
            f"{_mebibytes(memory.total)} are free ({memory.source})"
        )


def plan_on(
    device: str, settings: GeneratorSettings, model: ModelDirectory, reserved: int = 0
) -> MemoryPlan:
    """The plan for `cpu` or `cuda`, from the memory that is free there now.

    `reserved` bytes of it are left to other processes. Raises MemoryPlanError, CudaError.
    """
    memory = memory_limit() if device == "cpu" else device_memory()
    if reserved:
        source = f"{memory.source}, less {_mebibytes(reserved)} reserved for other processes"
        # Negative if the others alone take too much, so that the error says how much is missing.
        memory = replace(memory, free=memory.free - reserved, source=source)
    return plan_memory(device, settings, model, memory)


def plan_loaded(settings: GeneratorSettings, plan: MemoryPlan, allocated: int) -> int:
    """How many slots of `plan` fit into the CUDA device's free memory.

    To be called once the model is loaded and has executed its largest run, with `allocated` slots
    allocated. At least one, at most the `slots` setting. Raises CudaError.
    """
    free = device_memory().free + allocated * plan.slot_bytes
    share = int((free - CUDA_GRAPH_BYTES) * settings.on("cuda", "kv_memory_share"))
    cache_bytes = settings.kv_cache_bytes or share
    return max(1, min(int(settings.on("cuda", "slots")), cache_bytes // plan.slot_bytes))


def plan_memory(
    device: str, settings: GeneratorSettings, model: ModelDirectory, memory: MemoryLimit
) -> MemoryPlan:
    """As many of `settings.slots` as fit into kv_cache_bytes or, if unset, their share of memory.

    At least one: on the CPU it may exceed the share, and if max_sequence_length is not set, it is
    as short as it has to be. Raises MemoryPlanError.
    """
    demand = _demand(device, settings, model, memory)
    length = _slot_length(demand, device, settings)
    slot_bytes = demand.token_bytes * length
    share = demand.available - demand.packing_bytes
    if device == "cpu":
        share = int(share * settings.kv_memory_share)
    cache_bytes = settings.kv_cache_bytes or max(slot_bytes, share)
    slots = min(settings.on(device, "slots"), cache_bytes // slot_bytes)
    if slots < 1:
        raise MemoryPlanError(
            f"one slot of {length:,} tokens takes {slot_bytes:,} bytes, but the KV cache is "
            f"limited to {cache_bytes:,}: raise kv_cache_bytes or lower max_sequence_length"
        )
    _warn_if_tight(demand, slot_bytes, settings.kv_cache_bytes)
    needed_bytes = demand.needed_bytes(slot_bytes)
    return MemoryPlan(slots, length, slot_bytes, model.weight_bytes, needed_bytes, memory)


@dataclass(frozen=True)
class _Demand:
    """The memory that a model takes besides its slots."""

    model: ModelDirectory
    memory: MemoryLimit
    token_bytes: int  # of keys and values: 2 · layers · kv_heads · head_size elements
    working_bytes: int = 0
    packing_bytes: int = 0  # by which the weights may grow when they are repacked
    share: float = 1.0  # of the remaining memory that slots may take

    @property
    def available(self) -> int:
        """Bytes available for slots; negative if not even the weights fit."""
        return int((self.memory.free - self.model.weight_bytes - self.working_bytes) * self.share)

    def needed_bytes(self, slot_bytes: int) -> int:
        """Bytes of memory needed for one slot of this size to fit."""
        return self.model.weight_bytes + self.working_bytes + math.ceil(slot_bytes / self.share)

    @property
    def fitting_length(self) -> int:
        """Length in tokens of a single slot that takes all available memory."""
        return max(0, self.available) // self.token_bytes // _SLOT_GRANULARITY * _SLOT_GRANULARITY


def _demand(
    device: str, settings: GeneratorSettings, model: ModelDirectory, memory: MemoryLimit
) -> _Demand:
    precision = model.precision or ""
    elements = 2 * model.num_layers * model.num_kv_heads * model.head_size
    if device == "cpu":
        packing = int(model.weight_bytes * _PACKING_GROWTH.get(precision, 0))
        token_bytes = elements * (2 if precision == "fp16" else 4)
        return _Demand(model, memory, token_bytes, _WORKING_BYTES, packing)
    # The rest is left to the runtime: activations, CUDA graphs, copies of weights.
    share = 1.0 if settings.kv_cache_bytes else settings.on(device, "kv_memory_share")
    return _Demand(model, memory, elements * (4 if precision == "fp32" else 2), share=share)


def _slot_length(demand: _Demand, device: str, settings: GeneratorSettings) -> int:
    """Length of a slot in tokens; raises MemoryPlanError if not even one slot fits."""
    context = demand.model.context_length
    length = min(int(settings.on(device, "max_sequence_length")), context)
    length -= length % _SLOT_GRANULARITY
    if not length:
        raise MemoryPlanError(
            f"the model's context of {context} tokens is below the minimum of {_SLOT_GRANULARITY}"
        )
    fitting = demand.fitting_length
    if length <= fitting:
        return length
    is_default = "max_sequence_length" not in settings.model_fields_set
    if fitting < _MIN_DEFAULT_LENGTH or not is_default or settings.kv_cache_bytes:
        needed = demand.needed_bytes(demand.token_bytes * length)
        raise MemoryPlanError(_refusal(demand, length), needed)
    log.warning(
        "memory is short (%s): max_sequence_length is reduced to %s tokens instead of %s",
        demand.memory.source,
        f"{fitting:,}",
        f"{length:,}",
    )
    return fitting


def _refusal(demand: _Demand, length: int) -> str:
    """An error message: the memory needed, the memory available, and what would fit."""
    model, memory = demand.model, demand.memory
    slot_bytes = demand.token_bytes * length
    needed = demand.needed_bytes(slot_bytes)
    missing, rest = needed - memory.free, needed - model.weight_bytes - slot_bytes
    advice = [f"provide {_mebibytes(missing)} more"]
    if demand.fitting_length >= _MIN_DEFAULT_LENGTH:
        setting = "TRIVIUM_GENERATOR_MAX_SEQUENCE_LENGTH"
        advice.append(f"set {setting} to {demand.fitting_length} or less")
    bits = _WEIGHT_BITS.get(model.precision or "", 0)
    for precision in ("int8", "int4"):
        smaller = model.weight_bytes * _WEIGHT_BITS[precision] // (bits or 1)
        if _WEIGHT_BITS[precision] < bits and model.weight_bytes - smaller >= missing:
            advice.append(f"export it in {precision} (about {_mebibytes(smaller)} of weights)")
            break
    return (
        f"{model.id} needs {_mebibytes(needed)} of memory: "
        f"{_mebibytes(model.weight_bytes)} for weights, {_mebibytes(slot_bytes)} for one sequence "
        f"of {length:,} tokens, {_mebibytes(rest)} for the rest; of "
        f"{_mebibytes(memory.total)} ({memory.source}) {_mebibytes(max(0, memory.free))} are free: "
        f"{', or '.join(advice)}"
    )


def _warn_if_tight(demand: _Demand, slot_bytes: int, requested: int) -> None:
    memory = demand.memory
    if requested > demand.available:
        log.warning(
            "TRIVIUM_GENERATOR_KV_CACHE_BYTES is %s, but the weights leave only %s free (%s): "
            "the process may be killed when the cache fills up",
            _mebibytes(requested),
            _mebibytes(demand.available),
            memory.source,
        )
    elif demand.available - demand.packing_bytes < slot_bytes:
        most = demand.needed_bytes(slot_bytes) + demand.packing_bytes
        log.warning(
            "%s barely fits into memory: it may take up to %s, and %s of %s are free (%s)",
            demand.model.id,
            _mebibytes(most),
            _mebibytes(memory.free),
            _mebibytes(memory.total),
            memory.source,
        )


def _mebibytes(count: int) -> str:
    return f"{-(-count // _MEBIBYTE):,} MiB"
