"""Commands to the generator and updates from it, as plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from tokenizer_svc.request.types import ValidOptions


class GeneratorFinishReason(Enum):
    """Why the generator ended a sequence."""

    STOP_TOKEN = "stop token"  # the last token is the stop token
    LENGTH = "length"
    STOPPED = "stopped"  # by a stop command


class ConstraintKind(Enum):
    """How a constraint is written; the value is its name in the protocol."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True)
class Constraint:
    """What the generated text has to match, and the request's field that it was built from.

    `lines` maps lines of `text`, counted from 1, to other fields that they were built from.
    """

    kind: ConstraintKind
    text: str
    param: str
    lines: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerateCommand:
    """A generation to start; `whole` if nothing of it is read before its end.

    `bad_words` are token ids; those of `options` are the texts.
    """

    revision: str
    token_ids: list[int]
    options: ValidOptions
    max_new_tokens: int
    constraint: Constraint | None = None
    whole: bool = False
    bad_words: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class Finished:
    """The end of a sequence, and its usage."""

    reason: GeneratorFinishReason
    completion_tokens: int
    cached_prompt_tokens: int
    device_nanoseconds: int


@dataclass(frozen=True)
class CompletionReport:
    """The usage and finish reasons of a decoded completion, for the generator's usage record."""

    completion_tokens: int
    reasoning_tokens: int
    finish_reasons: Sequence[str]


@dataclass(frozen=True)
class TokenIdLogprobs:
    """A token's log-probability, and the ids and log-probabilities of the most likely tokens.

    `rank`, of prompt tokens only, is how many tokens are at least as likely, itself included.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]
    rank: int = 0


@dataclass(frozen=True)
class TokenUpdate:
    """New tokens of one sequence; `logprobs` is empty or as long as `token_ids`.

    `prompt_logprobs` are those of all prompt tokens but the first, in the first update of a
    generation that asked for them.
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
    instance_id: str  # changes at every start
