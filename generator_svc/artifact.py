"""What the model's folder and the machine's memory allow: slots, lengths, sampling defaults."""

import math
import os
from dataclasses import dataclass
from typing import Any

from generator_svc.sequence import Sampling
from trivium.model_directory import ModelDirectory, ModelDirectoryError

_SLOT_GRANULARITY = 8


class MemoryPlanError(ValueError):
    """Not even one slot fits into the memory, or the model's context is too short for one."""


@dataclass(frozen=True)
class MemoryPlan:
    """`slots` slots of `slot_length` tokens."""

    slots: int
    slot_length: int


def plan_memory(
    model: ModelDirectory, slots: int, max_length: int, cache_bytes: int, element_bytes: int
) -> MemoryPlan:
    """As many of `slots` slots of up to `max_length` tokens as `cache_bytes` hold.

    A token takes 2 · layers · kv_heads · head_size · element_bytes bytes.
    """
    length = min(max_length, model.context_length)
    length -= length % _SLOT_GRANULARITY
    if not length:
        raise MemoryPlanError(
            f"the model's context of {model.context_length} tokens is below {_SLOT_GRANULARITY}"
        )
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_size * element_bytes
    fitting = min(slots, cache_bytes // (per_token * length))
    if fitting < 1:
        raise MemoryPlanError(
            f"one slot of {length} tokens takes {per_token * length} bytes and the cache may have "
            f"{cache_bytes}: raise kv_cache_bytes or lower max_sequence_length"
        )
    return MemoryPlan(fitting, length)


def free_memory() -> int:
    """Bytes of main memory that can be had without pushing anything out."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    # Not Linux: half of what is there is a guess that leaves room for others.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


_LIMITS = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1.0, math.inf),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 10.0),
}


def default_sampling(model: ModelDirectory) -> Sampling:
    """The model's own sampling values from generation_config.json, then OpenAI's.

    A model that says `do_sample: false` in so many words is greedy by default.
    Raises ModelDirectoryError for a value that no request could have.
    """
    known: dict[str, Any] = {}
    if model.generation_config.get("do_sample") is False:
        known["temperature"] = 0.0
    for name, (least, most) in _LIMITS.items():
        value = model.generation_config.get(name)
        if value is None or name in known:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_whole = is_number and math.isfinite(value) and value == int(value)
        if not is_number or not least <= value <= most or (name == "top_k" and not is_whole):
            raise ModelDirectoryError(
                f"{model.path}: generation_config.json: {name} is {value!r}, which is not "
                f"{'a whole number ' if name == 'top_k' else ''}between {least} and {most}"
            )
        known[name] = int(value) if name == "top_k" else value  # some files say 50.0
    return Sampling(**known)
