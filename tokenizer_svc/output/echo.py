"""Echoes a prompt before its completions: its text, and the log-probabilities of its tokens."""

from collections.abc import Sequence
from dataclasses import replace

from tokenizer_svc.generator.types import TokenIdLogprobs
from tokenizer_svc.output.detokenizer import Detokenizer
from tokenizer_svc.output.events import Delta, TokenLogprob
from tokenizer_svc.output.logprobs import describe
from tokenizer_svc.tokenizer import Tokenizer


class Echo:
    """Puts a prompt, given as `text` and as `token_ids`, before the deltas of its choices."""

    def __init__(self, tokenizer: Tokenizer, text: str, token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._text = text
        self._token_ids = token_ids

    def begin(
        self, n: int, logprobs: Sequence[TokenIdLogprobs], alternatives: int | None
    ) -> list[Delta]:
        """The first deltas of all n choices.

        `logprobs` are those of all tokens but the first, shown with so many alternatives; None
        shows none of them.
        """
        entries = () if alternatives is None else self._entries(logprobs, alternatives)
        return [Delta(index, self._text, entries, completion_tokens=0) for index in range(n)]

    def shift(self, delta: Delta) -> Delta:
        """A later delta, with offsets that count the prompt's text."""
        if not delta.logprobs:
            return delta
        before = len(self._text)
        moved = (replace(entry, offset=before + entry.offset) for entry in delta.logprobs)
        return replace(delta, logprobs=tuple(moved))

    def _entries(
        self, logprobs: Sequence[TokenIdLogprobs], alternatives: int
    ) -> tuple[TokenLogprob, ...]:
        first, *others = zip(self._token_ids, self._offsets(), strict=True)
        token_bytes = self._tokenizer.token_bytes(first[0])
        return (
            TokenLogprob(token_bytes, 0.0, (), is_unscored=True),
            *(
                describe(self._tokenizer, token_id, entry, offset, alternatives)
                for (token_id, offset), entry in zip(others, logprobs, strict=True)
            ),
        )

    def _offsets(self) -> list[int]:
        """Where each token's text begins.

        A control token has text only if the prompt spells it out.
        """
        tokenizer, text = self._tokenizer, self._text
        detokenizer = Detokenizer(tokenizer)
        offsets, position = [], 0
        for token_id in self._token_ids:
            offsets.append(min(position + detokenizer.leaves_incomplete(token_id), len(text)))
            if tokenizer.is_special(token_id):
                spelled = tokenizer.token_bytes(token_id).decode(errors="replace")
                if text.startswith(spelled, position):
                    position += len(spelled)
                    detokenizer = Detokenizer(tokenizer, continues=text.startswith(" ", position))
            else:
                position += len(detokenizer.push(token_id))
        return offsets
