"""Holds back log-probabilities until the text of their tokens is shown.

Positions are offsets in a choice's decoded output, in characters. In the end only tokens whose text
is shown have an entry.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizer_svc.generator.types import TokenIdLogprobs
from tokenizer_svc.output.events import (
    Alternative,
    PromptLogprobs,
    RankedToken,
    TokenLogprob,
)
from tokenizer_svc.tokenizer import Tokenizer


def describe(
    tokenizer: Tokenizer,
    token_id: int,
    logprobs: TokenIdLogprobs,
    offset: int,
    alternatives: int | None = None,
) -> TokenLogprob:
    """A token's log-probabilities with the tokens' exact bytes, also of partial characters; with
    all of the most likely ones, or the first `alternatives`."""
    return TokenLogprob(
        token_bytes=tokenizer.token_bytes(token_id),
        logprob=logprobs.logprob,
        top=tuple(
            Alternative(tokenizer.token_bytes(top_id), logprob)
            for top_id, logprob in logprobs.top[:alternatives]
        ),
        offset=offset,
    )


def describe_prompt(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    scores: Sequence[TokenIdLogprobs],
    alternatives: int,
) -> PromptLogprobs:
    """The log-probabilities at each position of a prompt; `scores` has all but the first."""
    token_bytes = tokenizer.token_bytes
    positions: list[tuple[RankedToken, ...]] = [()]
    for token_id, score in zip(token_ids[1:], scores, strict=True):
        found = {token_id: RankedToken(token_bytes(token_id), score.logprob, token_id, score.rank)}
        for rank, (top_id, logprob) in enumerate(score.top[:alternatives], start=1):
            found[top_id] = RankedToken(token_bytes(top_id), logprob, top_id, rank)
        positions.append(tuple(found.values()))
    return tuple(positions)


@dataclass(frozen=True)
class _Held:
    start: int
    end: int
    entry: TokenLogprob
    keep_if_empty: bool  # whether it has an entry even without text


class HeldLogprobs:
    """The entries of tokens whose text has not been shown yet, in order."""

    def __init__(self) -> None:
        self._held: deque[_Held] = deque()
        self._shown: deque[tuple[int, int]] = deque()  # (start, end) of shown text

    def push(self, start: int, end: int, entry: TokenLogprob, keep_if_empty: bool = True) -> None:
        """Adds an entry whose token's text goes from `start` to `end`.

        A token that ends within a character ends with that character.
        """
        self._held.append(_Held(start, end, entry, keep_if_empty))

    def show(self, start: int, end: int) -> None:
        """Records that the text from `start` to `end`, after all shown before, is shown."""
        if self._shown and self._shown[-1][1] == start:
            start, _ = self._shown.pop()
        self._shown.append((start, end))

    def release(self, decided: int) -> tuple[TokenLogprob, ...]:
        """The entries of shown text; up to `decided` it is known what text is shown."""
        released = []
        while self._held and self._held[0].end <= decided:
            held = self._held.popleft()
            if self._is_shown(held):
                released.append(held.entry)
        return tuple(released)

    def finish(self) -> tuple[TokenLogprob, ...]:
        """Ends the choice: the remaining entries of shown text; all others are dropped."""
        return self.release(max((held.end for held in self._held), default=0))

    def _is_shown(self, held: _Held) -> bool:
        while self._shown and self._shown[0][1] <= held.start:
            self._shown.popleft()
        if held.start == held.end:
            return held.keep_if_empty
        return bool(self._shown) and self._shown[0][0] < held.end
