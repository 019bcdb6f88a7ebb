"""A plan's runs as arrays: each row's mask tells where its new tokens go."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from generator_svc.plan import Chunk, PromptBatch, Row
from generator_svc.run.batch import decode_inputs, prefill_inputs, prompt_inputs


def test_a_chunk_attends_to_all_before_it():
    """The mask covers the cached tokens and the chunk, and the run touches one slot."""
    inputs = prefill_inputs(Chunk(slot=3, start=2, token_ids=(7, 8, 9), wants_logits=True))

    assert (3, 1) == (inputs.first_slot, inputs.rows)
    assert [[7, 8, 9]] == inputs.input_ids.tolist()
    assert [[1, 1, 1, 1, 1]] == inputs.attention_mask.tolist()


def test_prompts_are_padded_on_the_right():
    """Ids and mask have the batch's padded length; the mask leaves the padding out."""
    batch = PromptBatch(2, ((7, 8, 9), (5,)), 4, (1.0, None))
    inputs = prompt_inputs(batch)

    assert (2, 2) == (inputs.first_slot, inputs.rows)
    assert [[7, 8, 9, 0], [5, 0, 0, 0]] == inputs.input_ids.tolist()
    assert [[1, 1, 1, 0], [1, 0, 0, 0]] == inputs.attention_mask.tolist()
    assert 4 == batch.padding


def test_rows_have_positions_of_their_own():
    """Each has one new token; the mask is as wide as the longest row, filled from the left."""
    inputs = decode_inputs((Row(5, 2), Row(0, 0, is_idle=True), Row(6, 3)))

    assert (0, 3) == (inputs.first_slot, inputs.rows)
    assert [[5], [0], [6]] == inputs.input_ids.tolist()
    assert [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]] == inputs.attention_mask.tolist()


@given(positions=st.lists(st.integers(0, 200), min_size=1, max_size=9))
def test_row_sums_are_one_more_than_the_positions(positions):
    """That is how attention learns where a row's token goes; the graph takes int64."""
    inputs = decode_inputs(tuple(Row(1, position) for position in positions))

    assert [position + 1 for position in positions] == inputs.attention_mask.sum(axis=1).tolist()
    assert (np.diff(inputs.attention_mask, axis=1) <= 0).all()
    assert {np.dtype(np.int64)} == {inputs.input_ids.dtype, inputs.attention_mask.dtype}
    assert all(array.flags.c_contiguous for array in (inputs.input_ids, inputs.attention_mask))
