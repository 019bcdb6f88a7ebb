"""Which prompt prefixes many conversations have in common, such as a system prompt."""

from collections import Counter, deque
from itertools import takewhile

from tokenizer_svc.generator.prefix_memory import Prefixes

CONVERSATIONS = 64
MAX_BLOCKS = 1024  # counted per prompt, which limits memory to about 10 MB


class CommonPrefixes:
    """Counts the prefixes of the last CONVERSATIONS conversations that began."""

    def __init__(self) -> None:
        self._recent: deque[Prefixes] = deque()
        self._counts: Counter[int] = Counter()

    def shared_blocks(self, prompt: Prefixes, share: float) -> int:
        """The length, in blocks, of the longest prefix of `prompt` that more than `share` of
        CONVERSATIONS conversations have."""
        threshold = share * CONVERSATIONS
        return sum(1 for _ in takewhile(lambda key: self._counts[key] > threshold, prompt))

    def add(self, prompt: Prefixes) -> None:
        """Records that a conversation began with `prompt`."""
        self._recent.append(prompt[:MAX_BLOCKS])
        self._counts.update(self._recent[-1])
        if len(self._recent) > CONVERSATIONS:
            for key in self._recent.popleft():
                self._counts[key] -= 1
                if not self._counts[key]:
                    del self._counts[key]
