"""A request for a chat completion, as the caller wrote it and after it was checked.

Plain values: knows no protobuf, and judges nothing (that is `validate`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Role(Enum):
    """Who says a message; the value is what chat templates call it."""

    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True)
class ToolCall:
    """A call that the assistant made earlier; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One message. `role` is None for one we do not know; a part is None if it is not text."""

    role: Role | None
    parts: tuple[str | None, ...] = ()
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    @property
    def content(self) -> str | None:
        """The text, parts joined by newlines; None for JSON's null."""
        return "\n".join(part or "" for part in self.parts) if self.parts else None


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; None means the model's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True)
class ChatRequest:
    """What the caller wrote; None means absent."""

    model: str
    messages: tuple[Message, ...]
    sampling: Sampling = Sampling()
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop: tuple[str, ...] = ()
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True)
class ValidRequest:
    """A request that was checked, so that nobody checks again. Made by `validate` only.

    `top_logprobs` is None when no log-probabilities are wanted at all.
    """

    messages: tuple[Message, ...]
    sampling: Sampling
    max_completion_tokens: int | None
    min_tokens: int
    ignore_eos: bool
    stop: tuple[str, ...]
    n: int
    top_logprobs: int | None
