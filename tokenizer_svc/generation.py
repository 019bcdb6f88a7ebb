"""What goes to the generator and what comes back, as plain values. Knows no protobuf."""

from dataclasses import dataclass
from enum import Enum

from tokenizer_svc.request import ValidRequest


class Ending(Enum):
    """Why the generator ended a continuation."""

    STOP_TOKEN = "stop token"  # the stop token is the last one
    LENGTH = "length"
    STOPPED = "stopped"  # by us


@dataclass(frozen=True)
class Start:
    """A generation to start."""

    revision: str
    token_ids: list[int]
    request: ValidRequest
    max_new_tokens: int


@dataclass(frozen=True)
class Finished:
    """The last word on a continuation."""

    ending: Ending
    completion_tokens: int
    cached_prompt_tokens: int
    device_nanoseconds: int


@dataclass(frozen=True)
class Logprobs:
    """At one token: its log-probability and the most likely tokens' ids and theirs."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Update:
    """What is new in one continuation; `logprobs` is empty or as long as `token_ids`."""

    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    finished: Finished | None = None


@dataclass(frozen=True)
class GeneratorInfo:
    """What a generator serves."""

    revision: str
    context_length: int
