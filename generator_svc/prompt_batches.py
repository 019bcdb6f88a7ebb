"""Which prompts are prefilled together in one run, and to which length they are padded.

A run reads all weights once, which takes longer than computing a short prompt's matrix products.
Standard library only.
"""

from collections.abc import Iterator

from generator_svc.plan import ATTENTION_TILE, MIN_CHUNK_TOKENS, Chunk, PromptBatch
from generator_svc.sequence import Sequence

# If prompts are batched, shorter cached prefixes are not reused: a prompt with a cached prefix
# needs a run of its own, and reading the weights for that costs more than recomputing the prefix
# (docs/log.md).
MIN_REUSED_TOKENS = 64

# Maximum positions of a batch, relative to those of its prompts padded individually: reading the
# weights once more costs as much as a few hundred positions (docs/log.md).
_MAX_GROWTH = 1.25


def take_batches(
    chunks: dict[Sequence, Chunk], max_size: int, max_positions: int, slot_length: int
) -> dict[tuple[Sequence, ...], PromptBatch]:
    """Removes whole prompts from `chunks` and returns them in batches, by their sequences.

    A batch has at most `max_size` prompts, in consecutive slots. A batch of more than one has at
    most `max_positions` positions, padding included.
    """
    groups: list[list[Sequence]] = []
    for sequence, chunk in sorted(chunks.items(), key=lambda item: item[1].slot):
        is_whole = chunk.start == 0 and chunk.wants_logits and not chunk.wants_all_logits
        # A single-token prompt is computed by kernels that round differently.
        if not is_whole or len(chunk.token_ids) < MIN_CHUNK_TOKENS:
            continue
        group = groups[-1] if groups else []
        if 0 < len(group) < max_size and _fits(group, sequence, max_positions):
            group.append(sequence)
        else:
            groups.append([sequence])
    batches = {}
    for group in groups:
        taken = [chunks.pop(sequence) for sequence in group]
        prompts = tuple(chunk.token_ids for chunk in taken)
        length = min(padded_length(max(map(len, prompts))), slot_length)
        temperatures = tuple(chunk.temperature for chunk in taken)
        batches[tuple(group)] = PromptBatch(taken[0].slot, prompts, length, temperatures)
    return batches


def padded_length(tokens: int) -> int:
    """The smallest padded length for `tokens`: four per power of two, multiples of a tile.

    CUDA attention is planned anew for each length, so there should be few of them.
    """
    step = max((1 << (tokens - 1).bit_length()) // 8, ATTENTION_TILE)
    return -(-tokens // step) * step


def padded_lengths(longest: int, slot_length: int) -> Iterator[int]:
    """All padded lengths of prompts of up to `longest` tokens, ascending."""
    length = 0
    while length < min(longest, slot_length):
        length = min(padded_length(length + 1), slot_length)
        yield length


def _fits(group: list[Sequence], sequence: Sequence, max_positions: int) -> bool:
    """Whether another prompt may be padded to a common length with those of `group`."""
    if sequence.slot != group[-1].slot + 1:
        return False
    lengths = [padded_length(s.prompt_length) for s in (*group, sequence)]
    return len(lengths) * max(lengths) <= min(_MAX_GROWTH * sum(lengths), max_positions)
