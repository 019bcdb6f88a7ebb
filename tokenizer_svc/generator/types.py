"""Commands to the generator and updates from it, as plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from tokenizer_svc.request.types import ValidOptions


class GeneratorFinishReason(Enum):
    """Why the generator ended a sequence."""

    STOP_TOKEN = "stop token"  # the stop token is the last one
    LENGTH = "length"
    STOPPED = "stopped"  # by a stop command


class ConstraintKind(Enum):
    """How a constraint is written; the value is its name in the protocol."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True)
class Constraint:
    """What the generated text has to match, and the request's field that it was made from.

    `lines` names other fields by the lines of `text`, from 1, that were made from them.
    """

    kind: ConstraintKind
    text: str
    param: str
    lines: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerateCommand:
    """A generation to start; `whole` if nobody reads it before its end."""

    revision: str
    token_ids: list[int]
    options: ValidOptions
    max_new_tokens: int
    constraint: Constraint | None = None
    whole: bool = False


@dataclass(frozen=True)
class Finished:
    """The end of a sequence, and what it took."""

    reason: GeneratorFinishReason
    completion_tokens: int
    cached_prompt_tokens: int
    device_nanoseconds: int


@dataclass(frozen=True)
class CompletionReport:
    """What became of all sequences as text, for the generator's usage record."""

    completion_tokens: int
    reasoning_tokens: int
    finish_reasons: Sequence[str]


@dataclass(frozen=True)
class TokenIdLogprobs:
    """At one token: its log-probability and the most likely tokens' ids and theirs."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenUpdate:
    """What is new in one sequence; `logprobs` is empty or as long as `token_ids`.

    `prompt_logprobs` are those of the prompt's tokens but the first, in the first update of a
    generation that wants them.
    """

    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenIdLogprobs, ...] = ()
    finished: Finished | None = None
    prompt_logprobs: tuple[TokenIdLogprobs, ...] = ()


@dataclass(frozen=True)
class GeneratorInfo:
    """What a generator serves."""

    revision: str
    context_length: int
    instance_id: str  # another one after each start
