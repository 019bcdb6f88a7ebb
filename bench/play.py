"""What is asked of a contender and what came back: plain values, without input or output.

Times are in seconds on one clock that never goes back; only differences mean anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from generator_svc.plan import StepPlan

Message = dict[str, str]


@dataclass(frozen=True)
class Ask:
    """A request: a conversation, and the prompt that our own template and tokenizer make of it.

    Servers are sent the messages, the bare engine the token ids. All answers are `output` tokens
    long, whatever the model would have said, and greedy unless there is a temperature.
    """

    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    output: int
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Script:
    """What clients ask, all at once, each of them one request after the other.

    `late` is asked once every client has had `late_after` tokens of its first answer.
    """

    clients: tuple[tuple[Ask, ...], ...]
    late: Ask | None = None
    late_after: int = 0

    @property
    def asks(self) -> list[Ask]:
        """All requests, client by client, the late one last: the order of the answers."""
        return [*itertools.chain(*self.clients), *([self.late] if self.late else ())]

    def numbered(self) -> tuple[list[list[tuple[int, Ask]]], tuple[int, Ask] | None]:
        """Each client's requests, and the late one, with their places among the answers."""
        places = itertools.count()
        clients = [[(next(places), ask) for ask in asks] for asks in self.clients]
        return clients, (next(places), self.late) if self.late else None


@dataclass(frozen=True)
class Answer:
    """When it was asked and had ended, and for each choice, when each part of it came.

    A part is a token in the engine, and an event with text in a stream, which is a token or
    several that were sent together. `fault` says why there is no whole answer.
    """

    asked: float
    ended: float
    choices: tuple[tuple[float, ...], ...]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    device_seconds: float | None = None
    text: str = ""
    token_ids: tuple[int, ...] = ()
    fault: str = ""

    @property
    def first(self) -> float:
        """Seconds from the request until every choice had begun."""
        return max(times[0] for times in self.choices) - self.asked

    @property
    def gaps(self) -> list[float]:
        """Seconds between one part of a choice and the next."""
        return [
            after - before for times in self.choices for before, after in itertools.pairwise(times)
        ]


@dataclass(frozen=True)
class Play:
    """A script as one contender played it, and what its processes used for it.

    `others` is the share of the machine's processor time that went to anything else.
    """

    answers: tuple[Answer, ...]
    cpu_seconds: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    others: float = 0.0


@dataclass
class Trace:
    """A request in the engine: its tokens of each choice, when they came and in which step.

    `asked_step` is the first step that had not ended when it was asked.
    """

    ask: Ask
    asked: float
    asked_step: int
    tokens: list[list[tuple[float, int, int]]]
    cached_tokens: int = 0
    device_nanoseconds: int = 0

    def answer(self) -> Answer:
        """As whoever asked the engine saw it."""
        return self._answer(self.asked, [[time for time, _, _ in row] for row in self.tokens])

    def replayed(self, ends: Sequence[float]) -> Answer:
        """As it would have been if step number i had ended at `ends[i]`, the first begun at 0."""
        asked = ends[self.asked_step - 1] if self.asked_step else 0.0
        times = [[ends[step] for _, step, _ in row] for row in self.tokens]
        return replace(self._answer(asked, times), device_seconds=None)

    def _answer(self, asked: float, times: list[list[float]]) -> Answer:
        return Answer(
            asked,
            max(row[-1] for row in times),
            tuple(map(tuple, times)),
            prompt_tokens=len(self.ask.token_ids),
            completion_tokens=sum(map(len, self.tokens)),
            cached_tokens=self.cached_tokens,
            device_seconds=self.device_nanoseconds / 1e9,
            token_ids=tuple(token for _, _, token in self.tokens[0]),
        )


@dataclass(frozen=True)
class Recording:
    """What the engine did with a script: the steps that it planned, and the requests in them."""

    plans: tuple[StepPlan, ...]
    traces: tuple[Trace, ...]
