"""A trace of request arrivals, drawn from a seed or read from a file.

Lengths are lognormal (Galton 1879), arrivals Poisson or bursty: a Markov-modulated Poisson
process with two states, calm and burst, whose mean rate is the given rate.
"""

import dataclasses
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """One request: its arrival in seconds, and its lengths in tokens.

    The first `shared_tokens` of its prompt are the same for all requests of its `conversation`.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    conversation: int = 0
    shared_tokens: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.shared_tokens < self.prompt_tokens
        assert self.output_tokens > 0


@dataclass(frozen=True)
class Lengths:
    """Lognormal numbers of tokens: their mean, the sigma of their logarithm, and a maximum.

    Sigma 0 makes all of them equal. The maximum lowers the mean slightly.
    """

    mean: float
    sigma: float = 0.0
    most: int = 2048

    def draw(self, generator: random.Random) -> int:
        length = generator.lognormvariate(math.log(self.mean) - self.sigma**2 / 2, self.sigma)
        return min(max(round(length), 1), self.most)


@dataclass(frozen=True)
class Bursts:
    """Two states: bursts have `peak` times the mean rate, and take `share` of the time.

    A burst lasts `seconds` on average; both states have exponential durations.
    """

    peak: float = 3.0
    share: float = 0.2
    seconds: float = 5.0

    def __post_init__(self) -> None:
        assert 0 < self.share < 1 <= self.peak <= 1 / self.share


def poisson(rate: float, generator: random.Random) -> Iterator[float]:
    """Endless arrival times in seconds, at `rate` per second."""
    now = 0.0
    while True:
        now += generator.expovariate(rate)
        yield now


def bursty(rate: float, bursts: Bursts, generator: random.Random) -> Iterator[float]:
    """Endless arrival times in seconds, at `rate` per second on average."""
    calm = rate * (1 - bursts.share * bursts.peak) / (1 - bursts.share)
    rates = (calm, rate * bursts.peak)
    stays = (bursts.seconds * (1 - bursts.share) / bursts.share, bursts.seconds)
    now, in_burst = 0.0, generator.random() < bursts.share
    while True:
        until = now + generator.expovariate(1 / stays[in_burst])
        while rates[in_burst]:
            now += generator.expovariate(rates[in_burst])
            if now > until:  # memoryless: the rest of this wait is redrawn
                break
            yield now
        now, in_burst = until, not in_burst


@dataclass(frozen=True)
class Workload:
    """What a trace is drawn from. `rate` is in requests per second; Poisson without `bursts`.

    Each request belongs to one of `conversations`, all equally likely, and begins with that
    conversation's `shared_tokens`, which count as part of the prompt.
    """

    rate: float
    prompt: Lengths
    output: Lengths
    bursts: Bursts | None = None
    conversations: int = 1
    shared_tokens: int = 0

    def draw(self, count: int, seed: int) -> list[Request]:
        """`count` requests; the same ones for the same seed."""
        times, shapes = random.Random(seed), random.Random(seed + 1)
        if self.bursts is None:
            arrivals = poisson(self.rate, times)
        else:
            arrivals = bursty(self.rate, self.bursts, times)
        return [self._request(next(arrivals), shapes) for _ in range(count)]

    def _request(self, arrival: float, shapes: random.Random) -> Request:
        prompt = max(self.prompt.draw(shapes), self.shared_tokens + 2)
        return Request(
            arrival=arrival,
            prompt_tokens=prompt,
            output_tokens=self.output.draw(shapes),
            conversation=shapes.randrange(self.conversations),
            shared_tokens=self.shared_tokens,
        )


def save(path: Path, requests: Sequence[Request]) -> None:
    """Writes JSON lines, one per request."""
    lines = [json.dumps(dataclasses.asdict(request)) + "\n" for request in requests]
    path.write_text("".join(lines))


def load(path: Path) -> list[Request]:
    """Reads what `save` wrote, in order of arrival."""
    requests = [Request(**json.loads(line)) for line in path.read_text().splitlines() if line]
    return sorted(requests, key=lambda request: request.arrival)
