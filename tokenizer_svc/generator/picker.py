"""Picks the generator for a prompt. Knows nothing about gRPC."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

from tokenizer_svc.generator.common_prefixes import CommonPrefixes
from tokenizer_svc.generator.load import TOKENS_PER_SEQUENCE, GeneratorLoad
from tokenizer_svc.generator.prefix_memory import BLOCK_TOKENS, Prefixes, PrefixMemory

# The extra load, in sequences, over the least busy generator that a cached prefix can outweigh.
MAX_BUSIER_SEQUENCES = 4
# The expected number of later turns of a conversation, which is a guess.
LATER_TURNS = 3
# Cached blocks that do not decide a conversation's home replica: chat templates begin alike.
NEGLIGIBLE_BLOCKS = 4


@dataclass(eq=False)
class Candidate:
    """What this process knows about a generator; its `name` is the same in all processes."""

    name: str
    load: GeneratorLoad = field(default_factory=GeneratorLoad)
    memory: PrefixMemory = field(default_factory=PrefixMemory)
    last_turn: int = 0
    instance_id: str = ""

    def connected(self, instance_id: str) -> None:
        """Handles a new connection. If the generator was restarted, its prefix cache is empty."""
        if self.instance_id and instance_id != self.instance_id:
            self.memory = PrefixMemory()
        self.instance_id = instance_id


class GeneratorPicker:
    """Weighs the prefix that a generator has cached against how busy it is."""

    def __init__(self) -> None:
        self._turns = itertools.count(1)
        self._common = CommonPrefixes()

    def pick(self, candidates: Sequence[Candidate], prompt: Prefixes) -> Candidate:
        """The generator with the longest cached prefix of `prompt`, unless it is busier than
        another one by more than the prefix is worth, or has no free slot while another one has.

        If several have the longest one, or none has any, the conversation's home replica among them
        is preferred, by what the rest of the prompt will be worth to later turns: other tokenizers
        may have sent earlier turns there, and will send later ones. Ties take turns.
        """
        known = {one: one.memory.known_blocks(prompt) for one in candidates}
        longest = max(known.values())
        is_later_turn = 0 < longest < len(prompt) and any(
            one.memory.is_end(prompt[longest - 1]) for one in candidates
        )
        if not is_later_turn:
            self._common.add(prompt)
        # A prefix shared by more conversations than one replica's share is computed once on each.
        common = self._common.shared_blocks(prompt, 1 / len(candidates))
        known = {one: max(blocks, common) for one, blocks in known.items()}
        longest = max(longest, common)
        home = None
        if longest < len(prompt):
            # The first block not shared with other conversations identifies a conversation.
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
    """How much busier, in sequences, a generator may be for this many cached blocks."""
    return min(blocks * BLOCK_TOKENS / TOKENS_PER_SEQUENCE, MAX_BUSIER_SEQUENCES)
