"""Log-probabilities of tokens, held back as long as the text of their tokens is.

Knows positions in a choice's text, counted in characters, and nothing of why text is held.
"""

from collections import deque

from tokenizer_svc.events import Alternative, TokenLogprob
from tokenizer_svc.generation import Logprobs
from tokenizer_svc.tokenizer import Tokenizer


def describe(tokenizer: Tokenizer, token_id: int, logprobs: Logprobs) -> TokenLogprob:
    """A token's log-probabilities with the tokens' true bytes, also of partial characters."""
    return TokenLogprob(
        token_bytes=tokenizer.token_bytes(token_id),
        logprob=logprobs.logprob,
        top=tuple(
            Alternative(tokenizer.token_bytes(top_id), logprob) for top_id, logprob in logprobs.top
        ),
    )


class HeldLogprobs:
    """The entries of tokens whose text is not out yet, in order."""

    def __init__(self) -> None:
        self._held: deque[tuple[int, int, TokenLogprob]] = deque()

    def push(self, start: int, end: int, entry: TokenLogprob) -> None:
        """An entry whose token's text goes from `start` to `end`.

        A token that ends inside a character ends with that character.
        """
        self._held.append((start, end, entry))

    def release(self, shown: int) -> tuple[TokenLogprob, ...]:
        """The entries whose text is among the `shown` characters."""
        released = []
        while self._held and self._held[0][1] <= shown:
            released.append(self._held.popleft()[2])
        return tuple(released)

    def cut(self, shown: int) -> tuple[TokenLogprob, ...]:
        """No text comes after `shown`: the entries with any text before it; the others are gone."""
        kept = tuple(entry for start, _, entry in self._held if start < shown)
        self._held.clear()
        return kept

    def flush(self) -> tuple[TokenLogprob, ...]:
        """All the text is out: all entries."""
        rest = tuple(entry for _, _, entry in self._held)
        self._held.clear()
        return rest
