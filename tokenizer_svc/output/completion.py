"""Decodes all choices of one prompt: updates in; deltas, choices to stop, and usage out."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from tokenizer_svc.generator.types import TokenUpdate
from tokenizer_svc.output.choice import ChoiceDecoder
from tokenizer_svc.output.decoding_options import DecodingOptions
from tokenizer_svc.output.events import (
    Delta,
    Event,
    FinishReason,
    Header,
    PromptDelta,
    PromptLogprobs,
    TokenLogprob,
    Usage,
)
from tokenizer_svc.request.types import ToolCall
from tokenizer_svc.tokenizer import Tokenizer


@dataclass(frozen=True)
class CompletionStep:
    """The result of one generator message: choices for the generator to stop, and new deltas."""

    stops: list[int]
    deltas: list[Delta]


class Completion:
    """Call `take` with every generator message until `done`; then `usage` is exact."""

    def __init__(
        self, n: int, options: DecodingOptions, tokenizer: Tokenizer, prompt_tokens: int
    ) -> None:
        self._prompt_tokens = prompt_tokens
        self._choices = [ChoiceDecoder(index, tokenizer, options) for index in range(n)]

    def take(self, updates: Iterable[TokenUpdate]) -> CompletionStep:
        """Decodes a message's updates; finds the choices that a stop string has ended."""
        step = CompletionStep([], [])
        for update in updates:
            choice = self._choices[update.index]
            was_open = choice.matched_stop is None
            delta = choice.push(update)
            if delta is not None:
                step.deltas.append(delta)
            if was_open and choice.matched_stop is not None and choice.finished is None:
                step.stops.append(update.index)
        return step

    @property
    def done(self) -> bool:
        """Whether every choice has received its final update."""
        return all(choice.finished is not None for choice in self._choices)

    @property
    def finish_reasons(self) -> list[FinishReason]:
        """Why each choice ended, in their order; those still running are left out."""
        return [choice.finish_reason for choice in self._choices if choice.finish_reason]

    @property
    def usage(self) -> Usage:
        """Usage so far. The prompt is shared, so its cached tokens are counted by choice 0."""
        first = self._choices[0].finished
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=sum(choice.completion_tokens for choice in self._choices),
            cached_prompt_tokens=0 if first is None else first.cached_prompt_tokens,
            device_nanoseconds=sum(
                choice.finished.device_nanoseconds for choice in self._choices if choice.finished
            ),
            reasoning_tokens=sum(choice.reasoning_tokens for choice in self._choices),
        )


@dataclass
class WholeChoice:
    """A choice as the unary call returns it."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    matched_stop: str | None = None
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs = ()

    def push(self, delta: Delta) -> None:
        self.content += delta.content
        self.reasoning += delta.reasoning
        for piece in delta.calls:
            if piece.id is not None:
                self.calls.append(ToolCall(piece.id, piece.name or "", piece.arguments))
            else:
                call = self.calls[-1]
                self.calls[-1] = ToolCall(call.id, call.name, call.arguments + piece.arguments)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason
        self.matched_stop = delta.matched_stop
        self.token_ids.extend(delta.token_ids)
        if isinstance(delta, PromptDelta):
            self.prompt_logprobs = delta.prompt_logprobs


@dataclass
class WholeCompletion:
    """All events of a stream, accumulated: the unary call is the same stream, read to its end."""

    header: Header | None = None
    choices: dict[int, WholeChoice] = field(default_factory=dict)
    usage: Usage | None = None

    @property
    def logprobs(self) -> int:
        """How many tokens have log-probabilities."""
        return sum(
            len(choice.logprobs) + len(choice.prompt_logprobs) for choice in self.choices.values()
        )

    def push(self, event: Event) -> None:
        if isinstance(event, Header):
            self.header = event
        elif isinstance(event, Usage):
            self.usage = event
        else:
            self.choices.setdefault(event.index, WholeChoice()).push(event)
