"""The input arrays of the runs of a plan."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from generator_svc.plan import Chunk, PromptBatch, Row

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RunInputs:
    """One run over the slots `first_slot` … `first_slot + rows - 1`.

    `input_ids` int64 [rows, new tokens]; `attention_mask` int64 [rows, longest], left-aligned ones
    for each row's tokens, new ones included: GroupQueryAttention derives the positions of a row's
    new tokens from the sum.
    """

    first_slot: int
    input_ids: Ids
    attention_mask: Ids

    @property
    def rows(self) -> int:
        return len(self.input_ids)


def prefill_inputs(chunk: Chunk) -> RunInputs:
    """The run of one chunk: with a past, GroupQueryAttention prefills at batch size 1 only."""
    total = chunk.start + len(chunk.token_ids)
    return RunInputs(
        first_slot=chunk.slot,
        input_ids=np.array([chunk.token_ids], dtype=np.int64),
        attention_mask=np.ones((1, total), dtype=np.int64),
    )


def prompt_inputs(batch: PromptBatch) -> RunInputs:
    """The run of several prompts from position 0, which GroupQueryAttention takes right-padded.

    The mask is as long as the padded prompts, which tells the operator that there is no past.
    """
    lengths = np.array([len(prompt) for prompt in batch.prompts], dtype=np.int64)
    mask = np.arange(batch.length) < lengths[:, None]
    input_ids = np.zeros(mask.shape, dtype=np.int64)
    input_ids[mask] = np.concatenate(batch.prompts)
    return RunInputs(batch.first_slot, input_ids, mask.astype(np.int64))


def decode_inputs(rows: tuple[Row, ...]) -> RunInputs:
    """The run of all decode rows: one new token each, at each row's own position."""
    tokens = np.array([row.token_id for row in rows], dtype=np.int64)
    positions = np.array([row.position for row in rows], dtype=np.int64)
    places = np.arange(positions.max() + 1, dtype=np.int64)
    mask = (places <= positions[:, None]).astype(np.int64)
    return RunInputs(first_slot=0, input_ids=tokens[:, None], attention_mask=mask)
