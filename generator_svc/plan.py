"""What one step does, decided in advance: a frozen, printable value, all that the runner knows.

A step first moves cache slots, then runs the prefill chunks one by one, then runs one decode
batch over the slots 0 to len(rows) - 1.
"""

from dataclasses import dataclass

# The attention of a chunk works through its tokens in tiles, and computes a token that is alone in
# its tile with another kernel than several, which rounds differently: a prompt cut there would
# give other logits than one that is not. A tile has twice as many tokens as a head has elements
# (measured on 16, 32 and 64), which is a multiple of ATTENTION_TILE for heads of 16, 32, 48, …
ATTENTION_TILE = 32
SHORTEST_CHUNK = 2


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
    """Computes `token_ids` as the tokens from position `start` of a slot."""

    slot: int
    start: int
    token_ids: tuple[int, ...]
    wants_logits: bool


@dataclass(frozen=True)
class Row:
    """Computes `token_id` as the token at `position` of the slot that has the row's number.

    An idle row is there because its neighbours are: what it writes at its position is
    garbage that is overwritten before it is ever read. Of a greedy row's logits only the largest
    is needed.
    """

    token_id: int
    position: int
    is_idle: bool = False
    is_greedy: bool = False


@dataclass(frozen=True)
class StepPlan:
    """One step. `rows[i]` belongs to slot i."""

    moves: tuple[Copy | Swap, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    rows: tuple[Row, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.moves or self.chunks or self.rows)
