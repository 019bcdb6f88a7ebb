"""The messages of a conversation, as a client sends them. Knows nothing about HTTP or protobuf."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rest_facade.requests.field import Strict, field_error, reject_unsupported
from trivium.field_errors import contradiction, missing, too_many
from trivium.limits import MAX_CONTENT_PARTS, MAX_MESSAGES, MAX_TOOL_CALLS
from trivium.wire.errors import ServiceError

Role = Literal["system", "developer", "user", "assistant", "tool"]
_UNSUPPORTED_PARTS = reject_unsupported(
    "image_url", "input_audio", "file", "refusal", "video_url", "audio_url", "image_embeds"
)


class ContentPart(Strict):
    """A piece of a message's content."""

    type: Annotated[Literal["text"], _UNSUPPORTED_PARTS] = Field(
        description="Only 'text' is supported."
    )
    text: str = Field(description="The text.")


def _as_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [ContentPart.model_construct(type="text", text=value)]
    if not isinstance(value, list):
        raise field_error("invalid_type", "one of a string or array of objects")
    return value


_Parts = Annotated[
    list[ContentPart], Field(min_length=1, max_length=MAX_CONTENT_PARTS, fail_fast=True)
]
Content = Annotated[_Parts, BeforeValidator(_as_parts, json_schema_input_type=str | _Parts)]


class FunctionCallParam(Strict):
    """The function that a tool call names, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCallParam(Strict):
    """A tool call that an assistant message of the conversation made."""

    id: str
    type: Annotated[Literal["function"], reject_unsupported("custom")]
    function: FunctionCallParam


_Calls = Annotated[list[ToolCallParam], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)]


class MessageParam(Strict):
    """One message of the conversation."""

    role: Annotated[Role, reject_unsupported("function")] = Field(
        description="The old role 'function' is not supported; use 'tool'."
    )
    content: Content | None = Field(
        None, description="Text, or text parts. Only an assistant's may be null."
    )
    name: str | None = Field(None, max_length=256, description="The speaker's name.")
    tool_calls: _Calls | None = Field(None, description="The calls that an assistant message made.")
    tool_call_id: str | None = Field(None, description="The call that a tool message answers.")
    reasoning_content: str | None = Field(
        None, description="The assistant's reasoning before this message."
    )
    reasoning: str | None = Field(None, description="Another name of reasoning_content.")

    def reasoning_text(self) -> str | None:
        """The reasoning, from either field."""
        return self.reasoning_content or self.reasoning

    def check(self, path: str) -> None:
        """Raises ServiceError for fields that do not go together; `path` is the message's path."""
        if self.content is None and self.role != "assistant":
            raise missing(f"{path}.content")
        for name in ("tool_calls", "reasoning_content", "reasoning"):
            if getattr(self, name) and self.role != "assistant":
                raise ServiceError(
                    "invalid_value",
                    f"Only messages with role 'assistant' have '{name}'.",
                    param=f"{path}.{name}",
                )
        if self.role == "tool" and self.tool_call_id is None:
            raise missing(f"{path}.tool_call_id")
        if self.reasoning_content and self.reasoning not in (None, "", self.reasoning_content):
            raise contradiction(
                f"{path}.reasoning", "and 'reasoning_content' differ; give only the latter."
            )


Messages = Annotated[
    list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]


def check_messages(messages: Sequence[MessageParam]) -> None:
    """Raises ServiceError for the first invalid message, or for too many parts or calls in all."""
    parts = calls = 0
    for position, message in enumerate(messages):
        path = f"messages[{position}]"
        message.check(path)
        parts += len(message.content or ())
        calls += len(message.tool_calls or ())
        if parts > MAX_CONTENT_PARTS:
            raise too_many(f"{path}.content", MAX_CONTENT_PARTS, "content parts")
        if calls > MAX_TOOL_CALLS:
            raise too_many(f"{path}.tool_calls", MAX_TOOL_CALLS, "tool calls")
