"""A plan's runs as the arrays that the graph takes. Knows nothing about sessions or memory."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from generator_svc.plan import Chunk, Row

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RunInputs:
    """One run over the slots `first_slot` … `first_slot + rows - 1`.

    `input_ids` int64 [rows, new tokens]; `attention_mask` int64 [rows, longest], ones for the
    tokens of each row, the new ones included, from the left: its row sums tell GroupQueryAttention
    where each row's new tokens go.
    """

    first_slot: int
    input_ids: Ids
    attention_mask: Ids

    @property
    def rows(self) -> int:
        return len(self.input_ids)


def prefill_inputs(chunk: Chunk) -> RunInputs:
    """The run of one chunk: batch 1, since a ragged batch takes one new token per row only."""
    total = chunk.start + len(chunk.token_ids)
    return RunInputs(
        first_slot=chunk.slot,
        input_ids=np.array([chunk.token_ids], dtype=np.int64),
        attention_mask=np.ones((1, total), dtype=np.int64),
    )


def decode_inputs(rows: tuple[Row, ...]) -> RunInputs:
    """The run of all rows: one new token each, every row at a position of its own."""
    positions = np.array([row.position for row in rows], dtype=np.int64)
    places = np.arange(positions.max() + 1, dtype=np.int64)
    return RunInputs(
        first_slot=0,
        input_ids=np.array([[row.token_id] for row in rows], dtype=np.int64),
        attention_mask=(places[None, :] <= positions[:, None]).astype(np.int64),
    )
