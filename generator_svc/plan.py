"""The plan of one step: a frozen, printable value, and all that the runner gets to know.

A step first moves cache slots, then runs the batches of prompts and the prefill chunks one by one,
then one decode batch over the slots 0 to len(rows) - 1.
"""

from dataclasses import dataclass
from typing import NamedTuple

# Attention processes a chunk in tiles of tokens, and uses a different kernel for a tile that holds
# a single token, which rounds differently: a prompt split there would give other logits than one
# that is not. A tile has twice as many tokens as a head has elements (measured for 16, 32 and 64),
# which is a multiple of ATTENTION_TILE for head sizes of 16, 32, 48, …
ATTENTION_TILE = 32
MIN_CHUNK_TOKENS = 2


@dataclass(frozen=True)
class Copy:
    """Copies the keys and values of the first `length` tokens of a slot to another."""

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

    With `wants_all_logits` those of every token are wanted, and of the last one for sampling only
    with `wants_logits`.
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

    What is written at the padding's positions is overwritten before it is ever read. There is a
    temperature for each prompt, as in Row.
    """

    first_slot: int
    prompts: tuple[tuple[int, ...], ...]
    length: int
    temperatures: tuple[float | None, ...]

    @property
    def padding(self) -> int:
        """Positions that are computed for nobody."""
        return len(self.prompts) * self.length - sum(map(len, self.prompts))


class Row(NamedTuple):  # one for each row of a step: a frozen dataclass takes a microsecond more
    """Decodes `token_id` at `position` of the slot that has the row's number.

    An idle row only pads the batch: what it writes at its position is overwritten before it is ever
    read. The logits will be sampled at `temperature`; None if only the largest is needed.
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
