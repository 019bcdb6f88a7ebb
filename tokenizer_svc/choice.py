"""One choice: token ids in, deltas of text out, up to its end.

Chains detokenizer, stop matcher and log-probabilities. Knows nothing of the other choices, nor
of how tokens come and deltas go.
"""

from tokenizer_svc.detokenizer import Detokenizer
from tokenizer_svc.events import Delta, FinishReason, TokenLogprob
from tokenizer_svc.generation import Ending, Finished, Update
from tokenizer_svc.logprobs import HeldLogprobs, describe
from tokenizer_svc.stop import StopMatcher, StopStrings
from tokenizer_svc.tokenizer import Tokenizer


class Choice:
    """`push` every update of the generator, the one that finishes included.

    `completion_tokens` counts up to the token that completed a stop string; `finished` is the
    generator's last word, which comes later than the choice's end when a stop string ended it.
    """

    def __init__(
        self, index: int, tokenizer: Tokenizer, stops: StopStrings, min_tokens: int
    ) -> None:
        self.completion_tokens = 0
        self.matched_stop: str | None = None
        self.finished: Finished | None = None
        self._index = index
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._matcher = StopMatcher(stops)
        self._min_tokens = min_tokens
        self._logprobs = HeldLogprobs()
        self._decoded = 0  # characters that came out of the detokenizer
        self._shown = 0  # characters that went out

    def push(self, update: Update) -> list[Delta]:
        """At most one delta with what is new, then, at the choice's end, one with the reason."""
        self.finished = update.finished or self.finished
        if self.matched_stop is not None:
            return []  # what the generator made before it heard of the stop
        text = self._take_tokens(update)
        if update.finished is not None and self.matched_stop is None:
            text += self._rest(update.finished)
        self._shown += len(text)
        entries = self._entries(ended=update.finished is not None)
        deltas = []
        if text or entries:
            deltas.append(Delta(self._index, text, entries, self.completion_tokens))
        if self.finished is not None or self.matched_stop is not None:
            deltas.append(self._last_delta())
        return deltas

    def _take_tokens(self, update: Update) -> str:
        token_ids = update.token_ids
        if update.finished is not None and update.finished.ending is Ending.STOP_TOKEN:
            token_ids = token_ids[:-1]  # it ends the text and is no part of it
        text = ""
        for position, token_id in enumerate(token_ids):
            self.completion_tokens += 1
            start = self._decoded
            piece = self._detokenizer.push(token_id)
            self._decoded += len(piece)
            if update.logprobs:
                end = self._decoded + self._detokenizer.pending
                entry = describe(self._tokenizer, token_id, update.logprobs[position])
                self._logprobs.push(start, end, entry)
            text += self._match(piece)
            if self.matched_stop is not None:
                break
        return text

    def _match(self, piece: str) -> str:
        result = self._matcher.push(piece, armed=self.completion_tokens > self._min_tokens)
        self.matched_stop = result.stop
        return result.text

    def _rest(self, finished: Finished) -> str:
        """What was held back, once the generator says that nothing more comes."""
        text = self._match(self._detokenizer.flush())
        if self.matched_stop is None:
            self.completion_tokens = finished.completion_tokens
            text += self._matcher.flush().text
        return text

    def _entries(self, ended: bool) -> tuple[TokenLogprob, ...]:
        if self.matched_stop is not None:
            return self._logprobs.cut(self._shown)
        return self._logprobs.flush() if ended else self._logprobs.release(self._shown)

    def _last_delta(self) -> Delta:
        length = self.matched_stop is None and (
            self.finished is not None and self.finished.ending is Ending.LENGTH
        )
        return Delta(
            index=self._index,
            content="",
            logprobs=(),
            completion_tokens=self.completion_tokens,
            finish_reason=FinishReason.LENGTH if length else FinishReason.STOP,
            matched_stop=self.matched_stop,
        )
