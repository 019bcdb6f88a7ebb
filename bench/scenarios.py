"""The scenarios: each defines the clients' requests and the numbers to measure.

A scenario plays the same scripts with every contender. `slots` is how many conversations a server
must hold at once, and `length` how many tokens the longest has, for servers that need to be told.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from bench.measures import Numbers, median_ms, percentiles, ratio, stalls, streaming, whole
from bench.play import Answer, Request, Script
from bench.prompts import Prompts

# The services have 32 slots by default; further clients queue.
MAX_SLOTS = 32


class Stage(Protocol):
    """Plays scripts."""

    def play(self, script: Script) -> Sequence[Answer]:
        """The answers, in the order of the script's requests."""


class Scenario(Protocol):
    """`name` is the scenario on the command line, `case` distinguishes its variants.

    `title` is the heading of all cases.
    """

    @property
    def name(self) -> str: ...
    @property
    def case(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def slots(self) -> int: ...
    @property
    def length(self) -> int: ...
    def run(self, stage: Stage, prompts: Prompts) -> Numbers: ...


@dataclass(frozen=True)
class Load:
    """A closed loop: each client sends its next request when the last one is answered."""

    name: str
    clients: int
    requests: int
    prompt: int
    output: int
    temperature: float = 0.0
    top_p: float = 1.0

    @property
    def case(self) -> str:
        return f"{self.clients} client{'s' * (self.clients > 1)}"

    @property
    def title(self) -> str:
        title = f"{self.prompt} prompt and {self.output} output tokens, all prompts different"
        if self.temperature == 0:
            return title
        return f"{title}, temperature {self.temperature:g}, top_p {self.top_p:g}"

    @property
    def slots(self) -> int:
        return min(self.clients, MAX_SLOTS)

    @property
    def length(self) -> int:
        return self.prompt + self.output

    def run(self, stage: Stage, prompts: Prompts) -> Numbers:
        """Tokens/s, TTFT and inter-token latency."""
        clients = tuple(
            tuple(self._request(prompts) for _ in range(self.requests)) for _ in range(self.clients)
        )
        return streaming(stage.play(Script(clients)))

    def _request(self, prompts: Prompts) -> Request:
        request = prompts.request(self.prompt, self.output)
        return replace(request, temperature=self.temperature, top_p=self.top_p)


@dataclass(frozen=True)
class SharedSystemPrompt:
    """Users one after another, with the same long system message, which is new to the server."""

    system: int = 500
    user: int = 40
    output: int = 16
    users: int = 8
    name: str = "shared"
    case: str = ""
    slots: int = 4

    @property
    def title(self) -> str:
        return f"A shared system prompt of {self.system} tokens: time to the first token"

    @property
    def length(self) -> int:
        return self.system + self.user + self.output

    def run(self, stage: Stage, prompts: Prompts) -> Numbers:
        """TTFT of the first user, who finds nothing cached, and of later users."""
        system = prompts.words(self.system)
        requests = [
            prompts.request(self.system + self.user, self.output, system=system)
            for _ in range(self.users)
        ]
        first, *later = stage.play(Script((tuple(requests),)))
        numbers = {
            **median_ms("cold_ttft", [a.first for a in whole([first])]),
            **percentiles("later_ttft", [a.first for a in whole(later)]),
        }
        return numbers | ratio("later_of_cold", numbers, "later_ttft_p50_ms", "cold_ttft_ms")


@dataclass(frozen=True)
class Turns:
    """Interleaved conversations on one server, and cold prompts of the same length.

    After each turn there is a `pause` in seconds, as if people were writing.
    """

    turns: int = 5
    conversations: int = 3
    prompt: int = 115
    words: int = 60
    output: int = 64
    pause: float = 1.0
    name: str = "turns"
    case: str = ""
    slots: int = 4

    @property
    def title(self) -> str:
        return f"Conversations of {self.turns} turns: time to the first token, by turn"

    @property
    def length(self) -> int:
        return self.prompt + self.turns * (2 * self.words + self.output)

    def run(self, stage: Stage, prompts: Prompts) -> Numbers:
        """TTFT by turn, also relative to a cold prompt of the same length."""
        numbers: Numbers = {}
        requests = [prompts.request(self.prompt, self.output) for _ in range(self.conversations)]
        for turn in range(1, self.turns + 1):
            answers = stage.play(Script((tuple(requests),)))
            numbers |= median_ms(f"turn_{turn}_ttft", [a.first for a in whole(answers)])
            if turn > 1:
                cold = stage.play(Script((self._cold(requests, prompts),)))
                numbers |= median_ms(f"cold_{turn}_ttft", [a.first for a in whole(cold)])
                names = f"turn_{turn}_ttft_ms", f"cold_{turn}_ttft_ms"
                numbers |= ratio(f"turn_{turn}_of_cold", numbers, *names)
            time.sleep(self.pause)
            requests = [
                prompts.next_turn(request, answer, self.words)
                for request, answer in zip(requests, answers, strict=True)
            ]
        return numbers

    @staticmethod
    def _cold(requests: list[Request], prompts: Prompts) -> tuple[Request, ...]:
        return tuple(prompts.request(len(request.token_ids), 1) for request in requests)


@dataclass(frozen=True)
class Choices:
    """A long prompt with one choice or several; answers of one token."""

    prompt: int = 2000
    n: int = 4
    requests: int = 3
    name: str = "choices"
    case: str = ""

    @property
    def title(self) -> str:
        return f"n={self.n} against n=1: a prompt of {self.prompt} tokens, answers of one"

    @property
    def slots(self) -> int:
        return self.n

    @property
    def length(self) -> int:
        return self.prompt + 1

    def run(self, stage: Stage, prompts: Prompts) -> Numbers:
        """Time until all choices have their first token, and device time, relative to n=1."""
        numbers: Numbers = {}
        for n in (1, self.n):
            requests = tuple(prompts.request(self.prompt, 1, n) for _ in range(self.requests))
            answers = whole(stage.play(Script((requests,))))
            name = "one" if n == 1 else "many"
            numbers |= median_ms(f"{name}_ttft", [a.first for a in answers])
            device = [a.device_seconds for a in answers if a.device_seconds is not None]
            if device:
                numbers[f"{name}_device_ms"] = statistics.median(device) * 1e3
        numbers |= ratio("ttft_ratio", numbers, "many_ttft_ms", "one_ttft_ms")
        return numbers | ratio("device_ratio", numbers, "many_device_ms", "one_device_ms")


@dataclass(frozen=True)
class LongPrompt:
    """Running streams, and a long prompt that arrives among them."""

    prompt: int = 4000
    streams: int = 4
    quiet: int = 64
    output: int = 320
    short: int = 115
    name: str = "stall"

    @property
    def case(self) -> str:
        return f"{self.prompt} tokens"

    @property
    def title(self) -> str:
        return f"Inter-token latency of {self.streams} streams, quiet and during a long prefill"

    @property
    def slots(self) -> int:
        return self.streams + 1

    @property
    def length(self) -> int:
        return self.prompt + 1

    def run(self, stage: Stage, prompts: Prompts) -> Numbers:
        """Inter-token latency of the streams before it arrives, and during its prefill."""
        clients = tuple((prompts.request(self.short, self.output),) for _ in range(self.streams))
        late = prompts.request(self.prompt, 1)
        *answers, last = stage.play(Script(clients, late, late_after=self.quiet))
        return stalls(answers, last)
