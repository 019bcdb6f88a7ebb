"""Which generator a prompt goes to. Knows nothing of gRPC."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizer_svc.generator.load import TOKENS_PER_SEQUENCE, GeneratorLoad
from tokenizer_svc.generator.prefix_memory import Prefixes, PrefixMemory

# How much busier, in sequences, the longest cached prefix lets a generator be than the least busy.
MAX_BUSIER_SEQUENCES = 8


@dataclass(eq=False)
class Candidate:
    """A generator as far as this process knows it."""

    load: GeneratorLoad = field(default_factory=GeneratorLoad)
    memory: PrefixMemory = field(default_factory=PrefixMemory)
    last_turn: int = 0

    def worth(self, prompt: Prefixes) -> float:
        """What its prefix cache saves, as sequences that it may be busier for it."""
        return min(self.memory.known_tokens(prompt) / TOKENS_PER_SEQUENCE, MAX_BUSIER_SEQUENCES)


class GeneratorPicker:
    """Weighs the prefix that a generator has cached against how busy it is."""

    def __init__(self) -> None:
        self._turns = itertools.count(1)

    def pick(self, candidates: Sequence[Candidate], prompt: Prefixes) -> Candidate:
        """The one that has cached the longest prefix of `prompt`, unless it is busier than another
        one by more than that is worth, or has no free slot where another one has. Equals take
        turns.
        """
        best = min(
            candidates,
            key=lambda one: (
                one.load.is_full,
                one.load.busy - one.worth(prompt),
                one.last_turn,
            ),
        )
        best.last_turn = next(self._turns)
        return best
