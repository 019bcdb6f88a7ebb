"""What is asked of the engine, and one continuation of a prompt on its way through it.

Knows nothing about tensors, slots' memory, gRPC or text.
"""

import enum
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from generator_svc.admission import Permit


class FinishReason(enum.Enum):
    """Why a sequence ended. The last two end the whole call, so no caller is told of them."""

    STOP_TOKEN = enum.auto()
    LENGTH = enum.auto()
    STOPPED = enum.auto()
    CANCELLED = enum.auto()
    FAILED = enum.auto()


class Stage(enum.Enum):
    """Where a sequence is."""

    WAITING = enum.auto()
    PREFILL = enum.auto()
    DECODE = enum.auto()
    FINISHED = enum.auto()


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; every value concrete and within its range. See generator.proto."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is the arg max of the logits as they are."""
        return (
            (self.temperature == 0 or self.top_k == 1 or self.top_p == 0)
            and not self.logit_bias
            and self.repetition_penalty == 1
            and self.presence_penalty == 0
            and self.frequency_penalty == 0
        )


class ConstraintError(Exception):
    """A constraint that cannot be kept; `code` is one of the table in trivium.wire.errors."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class ConstraintState(Protocol):
    """Where a continuation is in its constraint."""

    def allowed(self) -> Any:
        """Which tokens may come next, bool [vocabulary]."""

    def accept(self, token_id: int) -> None:
        """Takes the next token, one of those allowed."""


class Constraint(Protocol):
    """What the continuations of a request have to fit. `end_token_ids` end one that does."""

    @property
    def end_token_ids(self) -> frozenset[int]: ...

    def new_state(self) -> ConstraintState:
        """The state before the first token."""


@dataclass(frozen=True)
class Generation:
    """A request that has been checked: it fits the model, and nobody checks it again.

    `stop_token_ids` holds the model's end-of-sequence tokens too, unless they are ignored.
    `top_logprobs` is None when no log-probabilities are wanted. A complete text ends with one
    of the constraint's tokens even where they are ignored, since nothing else may follow.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    n: int = 1
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    constraint: Constraint | None = None

    @property
    def all_stop_token_ids(self) -> frozenset[int]:
        """The stop tokens, and those that end a constrained text."""
        if self.constraint is None:
            return self.stop_token_ids
        return self.stop_token_ids | self.constraint.end_token_ids


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of what the model gave a token and the most likely ones."""

    logprob: float
    top_token_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class SampledToken:
    """A token drawn for a sequence, with its log-probabilities if they were asked for."""

    token_id: int
    logprobs: Logprobs | None = None


@dataclass(eq=False)
class Sequence:
    """One of the n continuations of a prompt; owned by the engine's thread.

    `token_ids` is the prompt and what was generated. Of these, `computed` have their keys and
    values in `slot`. `device_nanoseconds` is the sequence's share of the device's time so far.
    """

    group: "Group"
    index: int
    token_ids: list[int]
    stage: Stage = Stage.WAITING
    slot: int = -1
    computed: int = 0
    cached_prompt_tokens: int = 0
    device_nanoseconds: int = 0
    finish_reason: FinishReason | None = None
    output_counts: Counter[int] = field(default_factory=Counter)
    constraint_state: ConstraintState | None = None

    @property
    def generation(self) -> Generation:
        return self.group.generation

    @property
    def prompt_length(self) -> int:
        return len(self.group.generation.prompt)

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_length

    @property
    def uncomputed(self) -> int:
        """Tokens whose keys and values are not in the cache yet; 1 while decoding."""
        return len(self.token_ids) - self.computed

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is the arg max of its logits, and that is all they are for."""
        generation = self.generation
        return (
            generation.sampling.is_plain_greedy
            and generation.constraint is None
            and generation.top_logprobs is None
            and self.generated >= generation.min_new_tokens
        )

    def append(self, token_id: int) -> None:
        """Takes a generated token, and finishes the sequence if it is the last."""
        self.token_ids.append(token_id)
        self.output_counts[token_id] += 1
        if token_id in self.generation.all_stop_token_ids:
            self.finish_reason = FinishReason.STOP_TOKEN
        elif self.generated >= self.generation.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH


@dataclass(frozen=True)
class Update:
    """What a step brought for one sequence: a token, the end, or both; or the group's failure."""

    group: "Group"
    sequence: Sequence
    token: SampledToken | None = None
    is_finished: bool = False
    error: BaseException | None = None


class Group:
    """A request in the engine: its sequences, which share one prompt.

    `permit` is its place in the queue, given back when the first sequence gets a slot.
    `prompt_logits`, float32 [vocabulary], is kept from the first sequence's prefill until
    all others have drawn their first token from it. `tag` is the caller's own.
    """

    def __init__(self, generation: Generation, permit: Permit, tag: Any = None) -> None:
        self.generation = generation
        self.permit = permit
        self.tag = tag
        self.sequences = [
            Sequence(self, index, list(generation.prompt)) for index in range(generation.n)
        ]
        self.prompt_logits: Any = None

    @property
    def is_finished(self) -> bool:
        return all(sequence.stage is Stage.FINISHED for sequence in self.sequences)
