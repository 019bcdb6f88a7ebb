"""The body of POST /v1/chat/completions, with strict types and ranges.

Knows nothing about HTTP or protobuf. `null` for an optional field means that it is absent. Unknown
fields are ignored; known ones that are not supported are refused by `unsupported`. Fields are
validated in declaration order; the first error is reported.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from rest_facade.requests.field import AnyText, Body, Strict, reject_unsupported, within
from rest_facade.requests.message import Messages, check_messages
from rest_facade.requests.options import SharedOptions
from rest_facade.requests.tool import ToolChoiceOption, Tools, check_tools
from rest_facade.requests.unsupported import refuse_unsupported_chat
from trivium.field_errors import contradiction
from trivium.limits import MAX_TEMPLATE_VARIABLES, TOP_LOGPROBS

_Effort = Literal["none", "minimal", "low", "medium", "high"]
_Kwargs = Annotated[dict[str, AnyText], Field(max_length=MAX_TEMPLATE_VARIABLES)]


class _Conversation(Strict):
    model: str = Field(description="The model's id, as GET /v1/models gives it.")
    messages: Messages = Field(description="The conversation so far, oldest first.")


class ChatCompletionRequest(SharedOptions, _Conversation, Body):
    """The body of POST /v1/chat/completions."""

    logprobs: bool | None = None
    top_logprobs: Annotated[int, within(TOP_LOGPROBS)] | None = Field(
        None, description="Needs logprobs."
    )
    tools: Tools | None = Field(None, description="Functions that the model may call.")
    tool_choice: ToolChoiceOption | None = Field(
        None, description="Default: 'auto' if there are tools, 'none' if not."
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether one answer may make more than one call. Default true."
    )
    reasoning_effort: Annotated[_Effort, reject_unsupported("xhigh", "max")] | None = Field(
        None, description="How much the model reasons first, for templates that support it."
    )
    chat_template_kwargs: _Kwargs | None = Field(
        None, description="Further variables for the chat template; those the operator allows."
    )
    continue_final_message: bool | None = Field(
        None, description="Continue the last message, which is the assistant's. Default false."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Open the assistant's message. Default: not continue_final_message."
    )
    verbosity: Annotated[Literal["medium"], reject_unsupported("low", "high")] | None = None
    modalities: list[Annotated[Literal["text"], reject_unsupported("audio", "image")]] | None = None
    store: bool | None = Field(None, description="True is not supported: nothing is kept.")

    def check(self, raw: Mapping[str, Any]) -> None:
        refuse_unsupported_chat(raw)
        self.check_sampling()
        if self.top_logprobs and not self.logprobs:
            raise contradiction("top_logprobs", "is only allowed when 'logprobs' is true.")
        check_messages(self.messages)
        self.check_constraint()
        check_tools(self.tools or [], self.tool_choice)
        if self.continue_final_message and self.add_generation_prompt:
            raise contradiction(
                "add_generation_prompt", "cannot be true with 'continue_final_message'."
            )
