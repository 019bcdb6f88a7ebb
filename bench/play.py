"""Requests to a contender and its answers: plain values, no I/O.

Times are in seconds on one monotonic clock; only differences are meaningful.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from generator_svc.plan import StepPlan

Message = dict[str, str]


@dataclass(frozen=True)
class Request:
    """A request: a conversation, and its prompt as made by our own chat template and tokenizer.

    Servers get the messages, the engine alone the token ids. All answers are `output` tokens long,
    ignoring EOS, and greedy unless a temperature is given.
    """

    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    output: int
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Script:
    """The requests of concurrent clients, each of which sends one after the other.

    `late` is sent once every client has received `late_after` tokens of its first answer.
    """

    clients: tuple[tuple[Request, ...], ...]
    late: Request | None = None
    late_after: int = 0

    @property
    def requests(self) -> list[Request]:
        """All requests, client by client, the late one last: the answers have the same order."""
        return [*itertools.chain(*self.clients), *([self.late] if self.late else ())]

    def numbered(self) -> tuple[list[list[tuple[int, Request]]], tuple[int, Request] | None]:
        """Each client's requests, and the late one, with their indices among the answers."""
        places = itertools.count()
        clients = [[(next(places), request) for request in requests] for requests in self.clients]
        return clients, (next(places), self.late) if self.late else None


@dataclass(frozen=True)
class Answer:
    """When the request was sent and its answer ended, and the times of each choice's parts.

    A part is a token in the engine, and an event with text in a stream, which carries one or more
    tokens. `fault` says why the answer is not complete.
    """

    sent_at: float
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
        """Seconds from the request until every choice has begun."""
        return max(times[0] for times in self.choices) - self.sent_at

    @property
    def gaps(self) -> list[float]:
        """Seconds between consecutive parts of each choice."""
        return [
            after - before for times in self.choices for before, after in itertools.pairwise(times)
        ]


@dataclass(frozen=True)
class Play:
    """A script as one contender played it, and the resources its processes used.

    `others` is the share of the machine's CPU time that went to anything else.
    """

    answers: tuple[Answer, ...]
    cpu_seconds: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    others: float = 0.0


@dataclass
class Trace:
    """A request in the engine: for each choice's tokens, their times, steps and token ids.

    `sent_step` is the first step that had not ended when the request was submitted.
    """

    request: Request
    sent_at: float
    sent_step: int
    tokens: list[list[tuple[float, int, int]]]
    cached_tokens: int = 0
    device_nanoseconds: int = 0

    def answer(self) -> Answer:
        """The answer as the engine's client saw it."""
        return self._answer(self.sent_at, [[time for time, _, _ in row] for row in self.tokens])

    def replayed(self, ends: Sequence[float]) -> Answer:
        """The answer if step i had ended at `ends[i]`, and the first step begun at 0."""
        sent_at = ends[self.sent_step - 1] if self.sent_step else 0.0
        times = [[ends[step] for _, step, _ in row] for row in self.tokens]
        return replace(self._answer(sent_at, times), device_seconds=None)

    def _answer(self, sent_at: float, times: list[list[float]]) -> Answer:
        return Answer(
            sent_at,
            max(row[-1] for row in times),
            tuple(map(tuple, times)),
            prompt_tokens=len(self.request.token_ids),
            completion_tokens=sum(map(len, self.tokens)),
            cached_tokens=self.cached_tokens,
            device_seconds=self.device_nanoseconds / 1e9,
            token_ids=tuple(token for _, _, token in self.tokens[0]),
        )


@dataclass(frozen=True)
class Recording:
    """What the engine did with a script: its plans, and the traces of the requests."""

    plans: tuple[StepPlan, ...]
    traces: tuple[Trace, ...]
