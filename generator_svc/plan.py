"""The plan of one step: a frozen, printable value, and all that the runner gets to see.

A step first moves KV cache slots, then runs the prompt batches and the prefill chunks one by one,
then one decode batch over slots 0 to len(rows) - 1.
"""

from dataclasses import dataclass
from typing import NamedTuple

# Attention processes a chunk in tiles of tokens. A tile that holds a single token is computed by a
# different kernel, which rounds differently, so a prompt split there would have different logits
# than one that is not. A tile has twice as many tokens as a head has elements (measured for 16, 32
# and 64), which is a multiple of ATTENTION_TILE for head sizes of 16, 32, 48, …
ATTENTION_TILE = 32
MIN_CHUNK_TOKENS = 2


@dataclass(frozen=True)
class Copy:
    """Copies the keys and values of the first `length` tokens from one slot to another."""

    source: int
    target: int
    length: int


@dataclass(frozen=True)
class Swap:
    """Exchanges the keys and values of the first `length` tokens of two slots."""

    first: int
    second: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """Prefills `token_ids` from position `start` of a slot; `temperature` as in Row.

    `wants_logits`: the logits of the last token are needed for sampling. `wants_all_logits`: those
    of every token are needed.
    """

    slot: int
    start: int
    token_ids: tuple[int, ...]
    wants_logits: bool
    temperature: float | None = 1.0
    wants_all_logits: bool = False


@dataclass(frozen=True)
class PromptBatch:
    """Prefills whole prompts of consecutive slots in one run, each padded on the right to `length`.

    What padding writes to the KV cache is overwritten before it is ever read. One temperature per
    prompt, as in Row.
    """

    first_slot: int
    prompts: tuple[tuple[int, ...], ...]
    length: int
    temperatures: tuple[float | None, ...]

    @property
    def padding(self) -> int:
        """Number of padding positions."""
        return len(self.prompts) * self.length - sum(map(len, self.prompts))


class Row(NamedTuple):  # one for each row of a step: a frozen dataclass takes a microsecond more
    """Decodes `token_id` at `position` of the slot whose number is the row's index.

    An idle row only pads the batch: what it writes to the KV cache is overwritten before it is ever
    read. The logits will be sampled at `temperature`; None if only their arg max is needed.
    """

    token_id: int
    position: int
    is_idle: bool = False
    temperature: float | None = 1.0


@dataclass(frozen=True)
class StepPlan:
    """One step. `rows[i]` belongs to slot i."""

    moves: tuple[Copy | Swap, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    rows: tuple[Row, ...] = ()
    batches: tuple[PromptBatch, ...] = ()
