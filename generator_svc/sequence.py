"""The engine's request, its sequences and their updates. No tensors, gRPC or text."""

import enum
import functools
import time
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from generator_svc.admission import Permit


class FinishReason(enum.Enum):
    """Why a sequence ended. CANCELLED and FAILED end the whole call: callers never see them."""

    STOP_TOKEN = enum.auto()
    LENGTH = enum.auto()
    STOPPED = enum.auto()
    CANCELLED = enum.auto()
    FAILED = enum.auto()


class SequenceStatus(enum.Enum):
    """A sequence's progress through the scheduler."""

    WAITING = enum.auto()
    PREFILL = enum.auto()
    DECODE = enum.auto()
    FINISHED = enum.auto()


@dataclass(frozen=True)
class SamplingParams:
    """Validated sampling parameters with defaults filled in; documented in sampling.proto."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    top_n_sigma: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: "array[int]" = field(default_factory=lambda: array("q"))  # int64
    seed: int = 0

    @functools.cached_property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, whatever the seed."""
        return self.temperature == 0 or self.top_k == 1 or self.top_p == 0

    @functools.cached_property
    def has_bias_or_penalties(self) -> bool:
        """Whether a logit bias or penalty changes the logits."""
        return bool(
            self.logit_bias
            or self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @functools.cached_property  # looked up several times for each token
    def is_plain_greedy(self) -> bool:
        """Whether the next token is the arg max of the unmodified logits."""
        return self.is_greedy and not self.has_bias_or_penalties


class ConstraintError(Exception):
    """A constraint cannot be enforced, or `param` of the request contradicts other fields.

    `code` is one of those in trivium.wire.errors.
    """

    def __init__(self, code: str, message: str, param: str = "constraint") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


class ConstraintState(Protocol):
    """A sequence's state within its constraint."""

    def allowed(self) -> Any:
        """The mask of allowed next tokens, bool [vocabulary]."""

    def accept(self, token_id: int) -> None:
        """Advances by the next token, which has to be allowed."""


class Constraint(Protocol):
    """What a request's text has to match. `end_token_ids` are the tokens that end such a text."""

    @property
    def end_token_ids(self) -> frozenset[int]: ...

    def new_state(self) -> ConstraintState:
        """The state before the first token."""


@dataclass(frozen=True)
class EngineRequest:
    """A validated request: it fits the model and is not checked again.

    `stop_token_ids` includes the model's end-of-sequence tokens, unless they are ignored.
    `top_logprobs` and `prompt_logprobs` are how many of the most likely tokens to report with each
    generated and prompt token; None if no log-probabilities are requested. A complete constrained
    text ends with one of the constraint's end tokens even if end-of-sequence tokens are ignored,
    since nothing else may follow. `bad_words` are sequences of tokens that may not be generated.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()
    n: int = 1
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()

    @functools.cached_property
    def has_masks(self) -> bool:
        """Whether tokens may be excluded at any position, and not only before `min_new_tokens`."""
        has_lists = bool(self.sampling.allowed_token_ids or self.bad_words)
        return has_lists or self.constraint is not None

    @functools.cached_property
    def bad_word_ends(self) -> dict[int, dict[tuple[int, ...], list[int]]]:
        """The last tokens of bad words, by the number of tokens before them and by these tokens."""
        ends: dict[int, dict[tuple[int, ...], list[int]]] = {}
        for *before, last in self.bad_words:
            ends.setdefault(len(before), {}).setdefault(tuple(before), []).append(last)
        return ends

    @functools.cached_property
    def all_stop_token_ids(self) -> frozenset[int]:
        """The stop tokens, and the end tokens of the constraint if there is one."""
        if self.constraint is None:
            return self.stop_token_ids
        return self.stop_token_ids | self.constraint.end_token_ids


@dataclass(frozen=True)
class CompletionReport:
    """The caller's report on a request's finished sequences; documented in generator.proto."""

    completion_tokens: int
    reasoning_tokens: int
    finish_reasons: tuple[str, ...]


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities of a token and of the most likely tokens at its position.

    `rank`, of prompt tokens only, is how many tokens are at least as likely, itself included.
    """

    logprob: float
    top_token_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]
    rank: int = 0


# Named tuples, since one is created for every token: a frozen dataclass takes a microsecond more.
class SampledToken(NamedTuple):
    """A token sampled for a sequence, with log-probabilities if requested."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(eq=False)
class Sequence:
    """One of the n continuations of a prompt; owned by the engine's thread.

    `token_ids` is the prompt followed by the generated tokens; `slot` holds the keys and values of
    the first `computed` of them. `device_nanoseconds` is its share of the device time so far.
    `output_counts` counts the generated tokens by id, if the request has a penalty or logit bias.
    """

    group: "SequenceGroup"
    index: int
    token_ids: list[int]
    status: SequenceStatus = SequenceStatus.WAITING
    slot: int = -1
    computed: int = 0
    cached_prompt_tokens: int = 0
    device_nanoseconds: int = 0
    finish_reason: FinishReason | None = None
    output_counts: Counter[int] = field(default_factory=Counter)
    constraint_state: ConstraintState | None = None

    def __post_init__(self) -> None:
        # Attributes, as they are read several times per token.
        self.request = request = self.group.request
        self.prompt_length = len(request.prompt)
        self.generated = len(self.token_ids) - self.prompt_length  # so far
        self._is_arg_max = (
            request.sampling.is_plain_greedy
            and not request.has_masks
            and request.top_logprobs is None
        )
        self._has_penalties = request.sampling.has_bias_or_penalties
        self._last_tokens = request.all_stop_token_ids
        self._seen: bytearray | None = None

    @property
    def uncomputed(self) -> int:
        """Number of tokens whose keys and values are not in the KV cache yet; 1 while decoding."""
        return len(self.token_ids) - self.computed

    @property
    def row_temperature(self) -> float | None:
        """The temperature at which the next token is sampled; None if only the arg max of its
        logits is needed."""
        if self._is_arg_max and self.generated >= self.request.min_new_tokens:
            return None
        return self.request.sampling.temperature

    @property
    def scores_prompt(self) -> bool:
        """Whether computing the prompt has to yield its log-probabilities: if they are requested,
        and no sequence of the group has computed it yet."""
        return self.request.prompt_logprobs is not None and self.group.prompt_logits is None

    def seen_tokens(self, vocabulary: int) -> bytearray:
        """One byte per token of the vocabulary: 1 if it occurs in the prompt or the answer.

        Only for requests with a penalty or logit bias. Kept up to date, so that looking up a few
        tokens per step is fast; to iterate over all of them, `distinct_prompt` and `output_counts`
        are faster.
        """
        assert self._has_penalties
        if self._seen is None:
            self._seen = bytearray(vocabulary)
            for token_id in (*self.group.distinct_prompt, *self.output_counts):
                self._seen[token_id] = 1
        return self._seen

    def append(self, token_id: int) -> FinishReason | None:
        """Appends a generated token; returns the finish reason if it is the last one."""
        self.token_ids.append(token_id)
        self.generated += 1
        if self._has_penalties:
            self.output_counts[token_id] += 1
            if self._seen is not None:
                self._seen[token_id] = 1
        if token_id in self._last_tokens:
            return FinishReason.STOP_TOKEN
        if self.generated >= self.request.max_new_tokens:
            return FinishReason.LENGTH
        return None


class SequenceUpdate(NamedTuple):
    """A sequence's new token, its end, or both, after a step; or its group's failure, as `error`.

    `is_urgent` for the first token and the end, which are sent without delay.
    """

    group: "SequenceGroup"
    sequence: Sequence
    token: SampledToken | None = None
    is_finished: bool = False
    error: BaseException | None = None
    is_urgent: bool = True


class SequenceGroup:
    """A request in the engine: its sequences, which share one prompt.

    `permit` is its place in the queue, released when the first sequence gets a slot, at
    `scheduled_at` on the monotonic clock, which is None until then. `prompt_logits`, float32
    [vocabulary], are kept from the first sequence's prefill until all others have sampled their
    first token from them. `prompt_logprobs`, if requested, are those of all computed prompt tokens
    but the first. `tag` is opaque to the engine.
    """

    def __init__(self, request: EngineRequest, permit: Permit, tag: Any = None) -> None:
        self.request = request
        self.permit = permit
        self.queued_at = time.monotonic()
        self.scheduled_at: float | None = None
        self.tag = tag
        self.sequences = [Sequence(self, index, list(request.prompt)) for index in range(request.n)]
        self.prompt_logits: Any = None
        self.prompt_logprobs: list[TokenLogprobs] = []

    @functools.cached_property
    def distinct_prompt(self) -> "array[int]":
        """The distinct tokens of the prompt, int64; for the repetition penalty."""
        return array("q", set(self.request.prompt))

    @property
    def is_finished(self) -> bool:
        return all(sequence.status is SequenceStatus.FINISHED for sequence in self.sequences)
