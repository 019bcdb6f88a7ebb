"""Which prompt prefixes were sent to a generator, and so are probably in its prefix cache.

A prompt is a chain of blocks of BLOCK_TOKENS tokens: a block's key is the hash of its tokens and
the key before it, so that equal keys mean equal prefixes. What other tokenizers sent is not known.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

BLOCK_TOKENS = 16
MAX_TOKENS = 2**20  # remembered per generator, about 8 MB

Prefixes = Sequence[int]  # the keys of a prompt's blocks, shortest prefix first


def prefixes(token_ids: Sequence[int]) -> Prefixes:
    """The keys of a prompt's full blocks, the same in every process. A collision only costs a cache
    miss."""
    keys, key = [], 0
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        key = hash((key, *token_ids[start : start + BLOCK_TOKENS]))
        keys.append(key)
    return keys


class PrefixMemory:
    """The prefixes sent to one generator, up to `max_tokens` tokens of them (LRU)."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._max_blocks = max_tokens // BLOCK_TOKENS
        self._blocks: OrderedDict[int, bool] = OrderedDict()  # whether a prompt went on after it

    def known_blocks(self, prompt: Prefixes) -> int:
        """The length, in blocks, of the longest prefix of `prompt` that was sent."""
        return sum(1 for _ in takewhile(self._blocks.__contains__, prompt))

    def is_end(self, block: int) -> bool:
        """Whether a prompt that was sent ended with this block, and none went on after it."""
        return self._blocks.get(block) is False

    def add(self, prompt: Prefixes) -> None:
        """Records that `prompt` was sent."""
        continued = False
        # The shortest prefix last, so that what other prompts may share is evicted last.
        for key in reversed(prompt):
            self._blocks[key] = continued or self._blocks.get(key, False)
            self._blocks.move_to_end(key)
            continued = True
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)

    def remove(self, prompt: Prefixes, known_blocks: int) -> None:
        """Undoes `add` for a refused prompt, of which `known_blocks` were known before."""
        for key in prompt[known_blocks:]:
            self._blocks.pop(key, None)
