"""The events of a completion, as plain values: header, deltas, usage."""

from dataclasses import dataclass
from enum import Enum


class FinishReason(Enum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True)
class Alternative:
    """A token that could have been, with its bytes and log-probability."""

    token_bytes: bytes
    logprob: float

    @property
    def token(self) -> str:
        """The token's text; bytes that are no whole character show as U+FFFD."""
        return self.token_bytes.decode(errors="replace")


@dataclass(frozen=True)
class TokenLogprob(Alternative):
    """A token, and the most likely ones in its place.

    `offset` is where its text begins, in characters of all that was generated, or of an echoed
    prompt and that. The first token of such a prompt follows nothing and `is_unscored`.
    """

    top: tuple[Alternative, ...]
    offset: int = 0
    is_unscored: bool = False


@dataclass(frozen=True)
class Header:
    """What identifies a completion; `created` is in seconds since 1970."""

    id: str
    created: float
    model: str
    fingerprint: str
    prompt_tokens: int


@dataclass(frozen=True)
class CallDelta:
    """A piece of a tool call; the first piece of each has id and name."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Delta:
    """What is new in one choice, maybe nothing in the last one, which has a reason."""

    index: int
    content: str
    logprobs: tuple[TokenLogprob, ...]
    completion_tokens: int
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop: str | None = None


@dataclass(frozen=True)
class Usage:
    """The tokens and the device time that a request took."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    device_nanoseconds: int
    reasoning_tokens: int = 0


Event = Header | Delta | Usage
