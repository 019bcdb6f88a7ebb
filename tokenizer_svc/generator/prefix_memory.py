"""Which prompt prefixes a generator was sent, and so has in its prefix cache, as far as we know.

A prompt is a chain of blocks of BLOCK_TOKENS tokens: a block's key is the hash of its tokens and of
the key before it, so that equal keys mean equal prefixes. Knows nothing of other tokenizers.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

BLOCK_TOKENS = 16
MAX_TOKENS = 2**20  # remembered of one generator: some 8 MB

Prefixes = Sequence[int]  # the keys of a prompt's blocks, the shortest prefix first


def prefixes(token_ids: Sequence[int]) -> Prefixes:
    """The keys of all whole blocks of a prompt, the same in every process. Collisions cost a
    detour, nothing else."""
    keys, key = [], 0
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        key = hash((key, *token_ids[start : start + BLOCK_TOKENS]))
        keys.append(key)
    return keys


class PrefixMemory:
    """The prefixes that one generator was sent, the most recent MAX_TOKENS of them (LRU)."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._max_blocks = max_tokens // BLOCK_TOKENS
        self._blocks: OrderedDict[int, bool] = OrderedDict()  # whether a prompt went on from it

    def known_blocks(self, prompt: Prefixes) -> int:
        """How many blocks the longest prefix of `prompt` has that it was sent."""
        return sum(1 for _ in takewhile(self._blocks.__contains__, prompt))

    def is_end(self, block: int) -> bool:
        """Whether a prompt that it was sent ended there, and none went on."""
        return self._blocks.get(block) is False

    def sent(self, prompt: Prefixes) -> None:
        """It was sent `prompt`."""
        went_on = False
        # The shortest prefix last: what others may share is forgotten after what they cannot.
        for key in reversed(prompt):
            self._blocks[key] = went_on or self._blocks.get(key, False)
            self._blocks.move_to_end(key)
            went_on = True
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)

    def forget(self, prompt: Prefixes, known_blocks: int) -> None:
        """It did not take `prompt`, of which it knew so many blocks before."""
        for key in prompt[known_blocks:]:
            self._blocks.pop(key, None)
