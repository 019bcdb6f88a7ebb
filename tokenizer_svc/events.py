"""What a caller is told while a completion is made, as plain values. Knows no protobuf."""

from dataclasses import dataclass
from enum import Enum


class FinishReason(Enum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"


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
    """A generated token, and the most likely ones in its place."""

    top: tuple[Alternative, ...]


@dataclass(frozen=True)
class Header:
    """What a completion is known by; `created` is in seconds since 1970."""

    id: str
    created: float
    model: str
    fingerprint: str
    prompt_tokens: int


@dataclass(frozen=True)
class Delta:
    """What is new in one choice; the last one has a reason and no content."""

    index: int
    content: str
    logprobs: tuple[TokenLogprob, ...]
    completion_tokens: int
    finish_reason: FinishReason | None = None
    matched_stop: str | None = None


@dataclass(frozen=True)
class Usage:
    """What the request cost."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    device_nanoseconds: int


Event = Header | Delta | Usage
