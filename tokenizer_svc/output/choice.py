"""Decodes one choice: token ids in, text deltas out.

Chains the detokenizer, the parser of the model's output format, the stop matcher and the
log-probabilities.
"""

from collections import deque
from dataclasses import dataclass, field

from tokenizer_svc.families.parser import (
    CallStart,
    Channel,
    Phase,
    Segment,
    Text,
)
from tokenizer_svc.generator.types import (
    Finished,
    GeneratorFinishReason,
    TokenIdLogprobs,
    TokenUpdate,
)
from tokenizer_svc.output.decoding_options import DecodingOptions
from tokenizer_svc.output.detokenizer import Detokenizer
from tokenizer_svc.output.events import CallDelta, Delta, FinishReason, TokenLogprob
from tokenizer_svc.output.logprobs import HeldLogprobs, describe
from tokenizer_svc.output.stop import StopMatcher
from tokenizer_svc.tokenizer import Tokenizer


@dataclass
class _NewOutput:
    """What one generator message adds to the choice."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.content or self.reasoning or self.calls or self.logprobs)


class ChoiceDecoder:
    """Decodes one sequence: `push` every update of the generator, including the final one.

    `completion_tokens` counts up to the token that completed a stop string. `finished` is the
    generator's final update, which arrives after the end of the choice if a stop string ended it.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, options: DecodingOptions) -> None:
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.matched_stop: str | None = None
        self.finished: Finished | None = None
        self.finish_reason: FinishReason | None = None
        self._index = index
        self._tokenizer = tokenizer
        self._options = options
        self._detokenizer = Detokenizer(
            tokenizer, options.markers, options.show_special, options.continues
        )
        self._parser = options.parser()
        self._matcher = StopMatcher(options.stops)
        self._logprobs = HeldLogprobs()
        self._undecided_tokens = 0  # count as reasoning if they turn out to open it
        self._calls = 0
        self._decoded = 0  # characters decoded so far
        # (start, length) of the content that the stop matcher holds back, as offsets in the decoded
        # output: the matcher sees content only, and log-probabilities are placed by these offsets.
        self._unshown: deque[tuple[int, int]] = deque()
        self._new = _NewOutput()

    def push(self, update: TokenUpdate) -> Delta | None:
        """The delta of what is new, with the finish reason at the end; None if there is neither."""
        self.finished = update.finished or self.finished
        if self.matched_stop is not None:
            return None  # generated before the stop command reached the generator
        self._new = new = _NewOutput()
        before = self.completion_tokens
        self._take_tokens(update)
        if update.finished is not None and self.matched_stop is None:
            self._finish(update.finished)
        ended = self.finished is not None or self.matched_stop is not None
        # An entry is sent with the text of its token, so it waits while that is held back.
        new.logprobs = self._logprobs.finish() if ended else self._logprobs.release(self._decided)
        if ended:
            self.finish_reason = self._finish_reason()
        token_ids: tuple[int, ...] = ()
        if self._options.return_token_ids:  # those that count; not the ones after a stop string
            token_ids = update.token_ids[: self.completion_tokens - before]
        if new.is_empty and not ended and not token_ids:
            return None
        return Delta(
            index=self._index,
            content=new.content,
            logprobs=new.logprobs,
            completion_tokens=self.completion_tokens,
            reasoning=new.reasoning,
            calls=tuple(new.calls),
            finish_reason=self.finish_reason,
            matched_stop=self.matched_stop,
            token_ids=token_ids,
        )

    def _take_tokens(self, update: TokenUpdate) -> None:
        token_ids = update.token_ids
        if (
            update.finished is not None
            and update.finished.reason is GeneratorFinishReason.STOP_TOKEN
            and self._options.shown_stop_tokens.isdisjoint(token_ids[-1:])
        ):
            token_ids = token_ids[:-1]  # it ends the text and is not part of it
        if not (update.logprobs or self._options.stops.texts or self._parser.may_reason):
            self._take_together(token_ids)
            return
        for position, token_id in enumerate(token_ids):
            self._take_token(token_id, update.logprobs[position] if update.logprobs else None)
            if self.matched_stop is not None:
                break

    def _take_together(self, token_ids: tuple[int, ...]) -> None:
        """Takes tokens that need not be handled one by one, in a third of the time."""
        self.completion_tokens += len(token_ids)
        start, piece = self._decoded, self._detokenizer.push_all(token_ids)
        self._decoded += len(piece)
        if piece:
            self._take_segments(self._parser.push(piece, start))

    def _take_token(self, token_id: int, logprobs: TokenIdLogprobs | None) -> None:
        self.completion_tokens += 1
        start, before = self._decoded, self._parser.phase
        if logprobs is not None:
            # Pending bytes that this token leaves incomplete become one U+FFFD before its text.
            own = start + self._detokenizer.leaves_incomplete(token_id)
        piece = self._detokenizer.push(token_id)
        self._decoded += len(piece)
        segments = self._parser.push(piece, start) if piece else []
        self._count_reasoning(before, self._parser.phase)
        if logprobs is not None:
            end = self._decoded + self._detokenizer.pending
            entry = describe(self._tokenizer, token_id, logprobs, own)
            # Within the answer, a token without text, such as a special token, has an entry too;
            # the markers around the reasoning have none.
            self._logprobs.push(own, end, entry, keep_if_empty=before is Phase.ANSWER)
        self._take_segments(segments)

    def _count_reasoning(self, before: Phase, after: Phase) -> None:
        # The markers' own tokens count as reasoning: the phase is REASONING only after the opening
        # one, and only before the closing one. Until a marker of several tokens is complete, it is
        # UNDECIDED.
        if Phase.REASONING in (before, after):
            self.reasoning_tokens += 1 + self._undecided_tokens
            self._undecided_tokens = 0
        elif after is Phase.UNDECIDED:
            self._undecided_tokens += 1
        else:
            self._undecided_tokens = 0

    def _take_segments(self, segments: list[Segment]) -> None:
        for segment in segments:
            if self.matched_stop is not None:
                return
            if not isinstance(segment, Text):
                self._take_call(segment)
            elif segment.channel is Channel.REASONING:
                self._new.reasoning += segment.text
            else:
                self._unshown.append((segment.start, len(segment.text)))
                self._match(segment.text)

    def _take_call(self, segment: Segment) -> None:
        if isinstance(segment, CallStart):
            self._calls += 1
            call_id = self._options.call_id()
            delta = CallDelta(self._calls - 1, id=call_id, name=segment.name)
            self._new.calls.append(delta)
        else:
            # All pieces of a call's arguments in one message are sent as one delta.
            last = self._new.calls[-1] if self._new.calls else CallDelta(self._calls - 1)
            joined = CallDelta(last.index, last.arguments + segment.text, last.id, last.name)
            self._new.calls[-1:] = [joined]

    def _match(self, text: str) -> None:
        # A stop string completed before `min_tokens` is ordinary text, as in vLLM.
        armed = self.completion_tokens > self._options.min_tokens
        result = self._matcher.push(text, armed=armed)
        self.matched_stop = result.stop
        included = self._options.include_stop and result.stop is not None
        self._show(result.text + (result.stop or "") if included else result.text)

    def _show(self, text: str) -> None:
        """Adds `text` to the delta: the oldest content not yet shown."""
        self._new.content += text
        left = len(text)
        while left:
            start, length = self._unshown.popleft()
            shown = min(left, length)
            self._logprobs.show(start, start + shown)
            if shown < length:
                self._unshown.appendleft((start + shown, length - shown))
            left -= shown

    @property
    def _decided(self) -> int:
        """The offset up to which it is known what text is shown."""
        return self._unshown[0][0] if self._unshown else self._decoded - self._parser.held

    def _finish(self, finished: Finished) -> None:
        """Ends the choice: flushes what was held back."""
        rest = self._detokenizer.flush()
        start, self._decoded = self._decoded, self._decoded + len(rest)
        if rest:
            self._take_segments(self._parser.push(rest, start))
        # Only an output that was cut off, or that has to be a call, can end within a marker. If the
        # model ended by itself, what looks like the beginning of a marker is text.
        is_cut = finished.reason is GeneratorFinishReason.LENGTH or self._options.forced_call
        cut = self._options.multi_token_markers if is_cut else frozenset()
        self._take_segments(self._parser.flush(cut))
        if self.matched_stop is None:
            # The generator counts the stop token too, which was not decoded.
            self.completion_tokens = finished.completion_tokens
            self._show(self._matcher.flush().text)

    def _finish_reason(self) -> FinishReason:
        ending = None if self.finished is None else self.finished.reason
        if self.matched_stop is None and ending is GeneratorFinishReason.LENGTH:
            return FinishReason.LENGTH
        return self._options.call_finish_reason if self._calls else FinishReason.STOP
