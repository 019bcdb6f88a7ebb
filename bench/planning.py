"""The fewest replicas of each stage that meet latency targets, found by simulation."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.simulation import Cluster, Result, simulate
from bench.trace import Request


@dataclass(frozen=True)
class Targets:
    """Limits in seconds for time to first token and inter-token latency, at a percentile."""

    first_token: float
    between_tokens: float
    rank: float

    def are_met(self, result: Result) -> bool:
        """Whether the targets are met and no request was refused."""
        return (
            len(result.served) == len(result.answers)
            and result.first_token(self.rank) <= self.first_token
            and result.between_tokens(self.rank) <= self.between_tokens
        )


@dataclass(frozen=True)
class Plan:
    """The numbers of replicas tried, and the smallest that meet the targets, if any."""

    tried: dict[tuple[int, int], Result]  # by generators and tokenizers
    found: tuple[int, int] | None


def smallest(most: int, is_enough: Callable[[int], bool]) -> int | None:
    """The smallest number from 1 to `most` that is enough, if any; any larger one must be too."""
    low, high = 0, 1
    while not is_enough(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def find_replicas(
    requests: Sequence[Request], cluster: Cluster, policy: str, targets: Targets, most: int
) -> Plan:
    """The fewest generators with `most` tokenizers, then the fewest tokenizers for these."""
    tried: dict[tuple[int, int], Result] = {}

    def is_enough(generators: int, tokenizers: int) -> bool:
        replicas = dataclasses.replace(cluster, generators=generators, tokenizers=tokenizers)
        result = simulate(requests, replicas, policy)
        tried[generators, tokenizers] = result
        return targets.are_met(result)

    generators = smallest(most, lambda count: is_enough(count, most))
    if generators is None:
        return Plan(tried, None)
    tokenizers = smallest(most, lambda count: is_enough(generators, count))
    return Plan(tried, None if tokenizers is None else (generators, tokenizers))
