"""Which prompts a step prefills, and how far: chunks within a token budget. Standard library only.

The budget is in tokens at the cost of a prompt's first tokens. Later tokens attend to more
positions and count for more.
"""

from generator_svc.plan import ATTENTION_TILE, MIN_CHUNK_TOKENS, Chunk
from generator_svc.prefill_cost import PrefillCostModel
from generator_svc.sequence import Sequence

MAX_STALL_MULTIPLIER = 4
_MIN_PREFILL_TOKENS = 2 * MIN_CHUNK_TOKENS  # any prompt can be split after this many tokens
# Maximum chunk if log-probabilities of the prompt are requested: these take half a millisecond per
# token on the host, and memory for every token's logits.
_MAX_SCORED_TOKENS = 64


class PrefillPlanner:
    """Plans chunks by the scheduler's policy, see there for the parameters.

    With `keeps_whole`, a prompt is not split merely to use up a step's budget, nor to keep a single
    token from being alone in its tile.
    """

    def __init__(
        self,
        cost: PrefillCostModel,
        stall_nanoseconds: int,
        max_num_batched_tokens: int,
        keeps_whole: bool,
    ) -> None:
        assert max_num_batched_tokens > _MIN_PREFILL_TOKENS
        self._cost = cost
        self._stall_nanoseconds = stall_nanoseconds
        self._max_num_batched_tokens = max_num_batched_tokens
        self._keeps_whole = keeps_whole

    def budget(self, decoding: int, pending: int) -> int:
        """Prompt tokens that a step may prefill, given the numbers of decoding sequences and
        pending prompts."""
        max_tokens = self._max_num_batched_tokens
        if not decoding:
            return max_tokens
        max_tokens = max(max_tokens - decoding, min(max_tokens, ATTENTION_TILE))
        # Prefill delays every decoding sequence, and shortens the wait of every pending prompt.
        multiplier = min(max(pending / decoding, 1.0), MAX_STALL_MULTIPLIER)
        return min(self._cost.tokens_within(multiplier * self._stall_nanoseconds), max_tokens)

    def plan(self, prefilling: list[Sequence], budget: int) -> dict[Sequence, Chunk]:
        """A chunk for each sequence that the budget reaches.

        `prefilling` is not empty, and has the oldest sequence first.
        """
        oldest, *others = prefilling
        others.sort(key=lambda sequence: sequence.uncomputed)
        chunks: dict[Sequence, Chunk] = {}
        if oldest.uncomputed > budget:
            left = self._add(chunks, others, budget / 2) + budget / 2
            self._add(chunks, [oldest], left)
        else:
            self._add(chunks, [oldest, *others], budget)
        return chunks

    def _add(
        self, chunks: dict[Sequence, Chunk], sequences: list[Sequence], budget: float
    ) -> float:
        """Adds a chunk for each of `sequences` that fits; returns what is left of `budget`."""
        whole_budget = budget
        for sequence in sequences:
            weight = max(self._cost.cost(sequence.computed) / self._cost.cost(0), 1.0)
            max_tokens = int(budget / weight)
            if sequence is sequences[0]:  # makes progress in every step, however slow
                max_tokens = max(max_tokens, _MIN_PREFILL_TOKENS)
            wants_all = sequence.scores_prompt
            if wants_all:
                max_tokens = min(max_tokens, _MAX_SCORED_TOKENS)
            length = chunk_length(sequence.uncomputed, max_tokens)
            if self._keeps_whole and not wants_all:
                if chunks and max_tokens < sequence.uncomputed <= whole_budget / weight:
                    break  # it will fit into the next step
                if not sequence.computed and max_tokens >= sequence.uncomputed:
                    length = sequence.uncomputed  # padding keeps tokens from being alone in a tile
            if not length:
                break
            budget -= length * weight
            start = sequence.computed
            tokens = tuple(sequence.token_ids[start : start + length])
            is_last, temperature = length == sequence.uncomputed, sequence.row_temperature
            chunks[sequence] = Chunk(sequence.slot, start, tokens, is_last, temperature, wants_all)
        return max(budget, 0.0)


def chunk_length(uncomputed: int, max_tokens: int) -> int:
    """The longest chunk that leaves no token alone in its attention tile, now or in the next chunk.

    0 if there is none of at most `max_tokens` tokens.
    """
    if uncomputed == 1:
        return min(1, max_tokens)
    for length in range(min(uncomputed, max_tokens), MIN_CHUNK_TOKENS - 1, -1):
        if length % ATTENTION_TILE != 1 and uncomputed - length != 1:
            return length
    return 0
