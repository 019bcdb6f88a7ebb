"""The events of a completion, as plain values: header, deltas, usage."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class FinishReason(Enum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True)
class Alternative:
    """A candidate token, with its bytes and log-probability."""

    token_bytes: bytes
    logprob: float

    @property
    def token(self) -> str:
        """The token's text; incomplete characters become U+FFFD."""
        return self.token_bytes.decode(errors="replace")


@dataclass(frozen=True)
class TokenLogprob(Alternative):
    """A token, and the most likely ones at its position.

    `offset` is where its text begins, in characters of the decoded output including an echoed
    prompt. The first token of an echoed prompt has no log-probability: it `is_unscored`.
    """

    top: tuple[Alternative, ...]
    offset: int = 0
    is_unscored: bool = False


@dataclass(frozen=True)
class RankedToken(Alternative):
    """A token at a position of the prompt; its rank is 1 if it is the most likely."""

    token_id: int
    rank: int


@dataclass(frozen=True)
class Header:
    """What identifies a completion; `created` is a Unix time in seconds.

    `prompts` are the token ids of each prompt, if requested.
    """

    id: str
    created: float
    model: str
    fingerprint: str
    prompt_tokens: int
    prompts: Sequence[list[int]] = ()


@dataclass(frozen=True)
class CallDelta:
    """A fragment of a tool call; the first fragment of each has id and name."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


# At each position of a prompt its token, then the most likely others; at the first none.
PromptLogprobs = tuple[tuple[RankedToken, ...], ...]


@dataclass(frozen=True)
class Delta:
    """What is new in one choice; its last delta has a finish reason and may have nothing else.

    `token_ids`, if requested, are all tokens since the last delta, with text or without.
    """

    index: int
    content: str
    logprobs: tuple[TokenLogprob, ...]
    completion_tokens: int
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop: str | None = None
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class PromptDelta(Delta):
    """The first delta of a prompt's first choice, with the prompt's log-probabilities."""

    prompt_logprobs: PromptLogprobs = ()


@dataclass(frozen=True)
class Usage:
    """Token counts and device time of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    device_nanoseconds: int
    reasoning_tokens: int = 0


Event = Header | Delta | Usage
