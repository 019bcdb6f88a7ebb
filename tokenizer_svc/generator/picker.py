"""Which generator a prompt goes to. Knows nothing of gRPC."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

from tokenizer_svc.generator.common_prefixes import CommonPrefixes
from tokenizer_svc.generator.load import TOKENS_PER_SEQUENCE, GeneratorLoad
from tokenizer_svc.generator.prefix_memory import BLOCK_TOKENS, Prefixes, PrefixMemory

# How much busier, in sequences, the longest cached prefix lets a generator be than the least busy.
MAX_BUSIER_SEQUENCES = 4
# Of a conversation, as far as one can know.
LATER_TURNS = 3
# What no generator is preferred for as a conversation's home: chat templates begin alike.
NEGLIGIBLE_BLOCKS = 4


@dataclass(eq=False)
class Candidate:
    """A generator as far as this process knows it; its `name` is the same to all processes."""

    name: str
    load: GeneratorLoad = field(default_factory=GeneratorLoad)
    memory: PrefixMemory = field(default_factory=PrefixMemory)
    last_turn: int = 0
    instance_id: str = ""

    def connected(self, instance_id: str) -> None:
        """A connection leads to it. If it was started anew, its prefix cache is empty."""
        if self.instance_id and instance_id != self.instance_id:
            self.memory = PrefixMemory()
        self.instance_id = instance_id


class GeneratorPicker:
    """Weighs the prefix that a generator has cached against how busy it is."""

    def __init__(self) -> None:
        self._turns = itertools.count(1)
        self._common = CommonPrefixes()

    def pick(self, candidates: Sequence[Candidate], prompt: Prefixes) -> Candidate:
        """The one that has cached the longest prefix of `prompt`, unless it is busier than another
        one by more than that is worth, or has no free slot where another one has.

        Where several have the longest one, or none has any, the conversation's home among them is
        preferred, by what the rest of the prompt will be worth to later turns: other tokenizers
        may have sent its earlier ones there, and will send those. Equals take turns.
        """
        known = {one: one.memory.known_blocks(prompt) for one in candidates}
        longest = max(known.values())
        is_later_turn = 0 < longest < len(prompt) and any(
            one.memory.is_end(prompt[longest - 1]) for one in candidates
        )
        if not is_later_turn:
            self._common.began(prompt)
        # What more conversations share than are for one to take, each computes once for itself.
        common = self._common.blocks(prompt, 1 / len(candidates))
        known = {one: max(blocks, common) for one, blocks in known.items()}
        longest = max(longest, common)
        home = None
        if longest < len(prompt):
            # The first block that is not shared with others tells conversations apart.
            first = prompt[longest]
            home = max(
                (one for one in candidates if known[one] >= longest - NEGLIGIBLE_BLOCKS),
                key=lambda one: hash((first, crc32(one.name.encode()))),
            )

        def rank(one: Candidate) -> tuple[bool, float, int]:
            busy = one.load.busy - _worth(known[one])
            if one is home:
                busy -= _worth((len(prompt) - longest) * LATER_TURNS)
            return one.load.is_full, busy, one.last_turn

        best = min(candidates, key=rank)
        best.last_turn = next(self._turns)
        return best


def _worth(blocks: int) -> float:
    """Sequences that a generator may be busier for so many cached blocks."""
    return min(blocks * BLOCK_TOKENS / TOKENS_PER_SEQUENCE, MAX_BUSIER_SEQUENCES)
