"""How much of the host a model gets: threads, KV cache bytes, slots and their length."""

import logging
from dataclasses import dataclass

from trivium.host_limits import MemoryLimit
from trivium.model_directory import ModelDirectory

log = logging.getLogger(__name__)

_SLOT_GRANULARITY = 8
_MEBIBYTE = 2**20

# Up to 16 threads no model gets slower: one of 250 MiB decodes fastest with 8 to 12 and prefills
# fastest with 16. Beyond that, a thread needs enough weights to read to make up for the cost of
# synchronising with it: 2,330 MiB still gain a tenth from 12 to 16 threads, at 146 MiB each
# (docs/log.md).
_DEFAULT_MAX_THREADS = 16
_WEIGHT_BYTES_PER_THREAD = 64 * _MEBIBYTE

# Beside weights and cache: activations, masks, responses, and the process that compiles untrusted
# constraints.
_WORKING_BYTES = 272 * _MEBIBYTE

_MIN_ADVISED_LENGTH = 256  # tokens; a shorter context is not worth suggesting


class MemoryPlanError(ValueError):
    """Memory does not hold a single slot, or the model's context is too short for one."""


def plan_threads(cores: int, weight_bytes: int) -> int:
    """Default number of threads of a run on the CPU: at most one per core."""
    return min(cores, max(_DEFAULT_MAX_THREADS, weight_bytes // _WEIGHT_BYTES_PER_THREAD))


@dataclass(frozen=True)
class MemoryPlan:
    """`slots` slots of `slot_length` tokens."""

    slots: int
    slot_length: int


def host_cache_bytes(
    model: ModelDirectory,
    memory: MemoryLimit,
    max_length: int,
    element_bytes: int,
    share: float,
    requested: int = 0,
) -> int:
    """Bytes of main memory for the KV cache, planned before the weights are loaded.

    `requested` or, if that is 0, a `share` of what the weights leave free, but at least one slot.
    Raises MemoryPlanError if not even one slot fits.
    """
    length = _slot_length(model, max_length)
    per_token = _token_bytes(model, element_bytes)
    slot_bytes = per_token * length
    available = memory.free - model.weight_bytes - _WORKING_BYTES
    if available < slot_bytes:
        needed = model.weight_bytes + _WORKING_BYTES + slot_bytes
        fitting = available // per_token // _SLOT_GRANULARITY * _SLOT_GRANULARITY
        shorter = f", or set TRIVIUM_GENERATOR_MAX_SEQUENCE_LENGTH to {fitting} or less"
        raise MemoryPlanError(
            f"{model.id} needs {_mebibytes(needed)} of memory: {_mebibytes(model.weight_bytes)} "
            f"for weights, {_mebibytes(slot_bytes)} for one sequence of {length} tokens, "
            f"{_mebibytes(_WORKING_BYTES)} for the rest; of {_mebibytes(memory.total)} "
            f"({memory.source}) {_mebibytes(memory.free)} are free: allow "
            f"{_mebibytes(needed - memory.free)} more"
            f"{shorter if fitting >= _MIN_ADVISED_LENGTH else ''}"
        )
    if requested > available:
        log.warning(
            "TRIVIUM_GENERATOR_KV_CACHE_BYTES allows %s and weights leave %s (%s): the process "
            "may be killed when the cache fills up",
            _mebibytes(requested),
            _mebibytes(available),
            memory.source,
        )
    return requested or max(slot_bytes, int(available * share))


def plan_memory(
    model: ModelDirectory, slots: int, max_length: int, cache_bytes: int, element_bytes: int
) -> MemoryPlan:
    """As many of `slots` slots of up to `max_length` tokens as `cache_bytes` hold.

    A token takes 2 · layers · kv_heads · head_size · element_bytes bytes. Raises MemoryPlanError.
    """
    length = _slot_length(model, max_length)
    per_token = _token_bytes(model, element_bytes)
    fitting = min(slots, cache_bytes // (per_token * length))
    if fitting < 1:
        raise MemoryPlanError(
            f"one slot of {length} tokens takes {per_token * length} bytes and the cache may have "
            f"{cache_bytes}: raise kv_cache_bytes or lower max_sequence_length"
        )
    return MemoryPlan(fitting, length)


def _slot_length(model: ModelDirectory, max_length: int) -> int:
    length = min(max_length, model.context_length)
    length -= length % _SLOT_GRANULARITY
    if not length:
        raise MemoryPlanError(
            f"the model's context of {model.context_length} tokens is below {_SLOT_GRANULARITY}"
        )
    return length


def _token_bytes(model: ModelDirectory, element_bytes: int) -> int:
    return 2 * model.num_layers * model.num_kv_heads * model.head_size * element_bytes


def _mebibytes(count: int) -> str:
    return f"{-(-count // _MEBIBYTE):,} MiB"
