"""One completion: its choices, which of them to stop, and what all of it cost.

Knows nothing of calls and connections: updates of the generator go in, events come out.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from tokenizer_svc.choice import Choice
from tokenizer_svc.events import Delta, Event, FinishReason, Header, TokenLogprob, Usage
from tokenizer_svc.generation import Update
from tokenizer_svc.request import ValidRequest
from tokenizer_svc.stop import StopStrings
from tokenizer_svc.tokenizer import Tokenizer


@dataclass(frozen=True)
class Step:
    """What follows from one message of the generator: choices to stop there, deltas to show."""

    stops: list[int]
    deltas: list[Delta]


class Completion:
    """`take` every message of the generator until `done`; then `usage` is exact."""

    def __init__(self, request: ValidRequest, tokenizer: Tokenizer, prompt_tokens: int) -> None:
        stops = StopStrings(request.stop)
        self._prompt_tokens = prompt_tokens
        self._choices = [
            Choice(index, tokenizer, stops, request.min_tokens) for index in range(request.n)
        ]

    def take(self, updates: Iterable[Update]) -> Step:
        """The deltas of a message's updates, and which continuations are complete by their text."""
        step = Step([], [])
        for update in updates:
            choice = self._choices[update.index]
            was_open = choice.matched_stop is None
            step.deltas.extend(choice.push(update))
            if was_open and choice.matched_stop is not None and choice.finished is None:
                step.stops.append(update.index)
        return step

    @property
    def done(self) -> bool:
        """Whether the generator has said its last word on every choice."""
        return all(choice.finished is not None for choice in self._choices)

    @property
    def usage(self) -> Usage:
        """What was used so far; the prompt's share in the cache is that of choice 0."""
        first = self._choices[0].finished
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=sum(choice.completion_tokens for choice in self._choices),
            cached_prompt_tokens=0 if first is None else first.cached_prompt_tokens,
            device_nanoseconds=sum(
                choice.finished.device_nanoseconds for choice in self._choices if choice.finished
            ),
        )


@dataclass
class WholeChoice:
    """A choice as the unary call gives it."""

    content: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    matched_stop: str | None = None


@dataclass
class WholeAnswer:
    """All events of a stream put together: the unary call is the same stream, read to its end."""

    header: Header | None = None
    choices: dict[int, WholeChoice] = field(default_factory=dict)
    usage: Usage | None = None

    def push(self, event: Event) -> None:
        if isinstance(event, Header):
            self.header = event
        elif isinstance(event, Usage):
            self.usage = event
        else:
            choice = self.choices.setdefault(event.index, WholeChoice())
            choice.content += event.content
            choice.logprobs.extend(event.logprobs)
            choice.finish_reason = event.finish_reason
            choice.matched_stop = event.matched_stop
